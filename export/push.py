"""Upload a package to the Hugging Face hub, with a model card that is written from its manifest."""

from __future__ import annotations

import math
from pathlib import Path

from autosteer.runtime.console import table
from autosteer.runtime.errors import InputError, first_line
from autosteer.runtime.hub import PREFIX
from autosteer.runtime.manifest import MANIFEST_FILE, Manifest

CARD = "README.md"


def check_login(repo: str) -> None:
    """Raise InputError if this machine cannot upload: asked before an export that may take long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise InputError(f"--push {repo}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except Exception as err:  # of the hub, or of the HTTP library that this huggingface_hub uses
        raise InputError(f"--push {repo}: {first_line(err)}") from err


def push(folder: Path, repo: str) -> str:
    """Upload the package and its card in one commit; returns the commit's address. The repository is made if need be.

    Raises InputError if the hub refuses; the package in `folder` stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    manifest = Manifest.load(folder)
    files = [CommitOperationAdd(file, folder / file) for file in (MANIFEST_FILE, *manifest.paths())]
    card = CommitOperationAdd(CARD, model_card(manifest, repo).encode())
    try:
        HfApi().create_repo(repo, exist_ok=True)
        commit = HfApi().create_commit(repo, [*files, card], commit_message="Package made by autosteer-export")
    except Exception as err:  # as above
        raise InputError(
            f"--push {repo}: not uploaded ({first_line(err)}); the package is in {folder}: "
            f"`hf upload {repo} {folder}` uploads it without a model card"
        ) from err
    return str(commit.commit_url)


def model_card(manifest: Manifest, repo: str) -> str:
    """The hub's README.md: what the package is, how to run it, what its gate was measured to do, how it was checked."""
    source, dims = manifest.source, manifest.dims
    takes = "images and text" if manifest.image else "text"
    sections = [
        "\n".join(
            [
                "---",
                "library_name: autosteer-edge",
                *([f"base_model: {source.repo}"] if "/" in source.repo else []),
                *([f"license: {source.licence}"] if source.licence else []),
                f"pipeline_tag: {'image-text-to-text' if manifest.image else 'text-generation'}",
                "tags: [onnx, safety, autosteer]",
                "---",
            ]
        ),
        f"# {source.repo} with its safety gate" if manifest.guarded else f"# {source.repo}, without a safety gate",
        f"An ONNX package for [AutoSteer edge](https://arxiv.org/abs/2507.13255), which takes {takes}. It was made "
        f"from `{source.repo}`{f' at commit `{source.revision}`' if source.revision else ''}: {dims.num_hidden_layers} "
        f"decoder layers, split at layer {manifest.split_layer}, weights in {manifest.precision}, KV caches in "
        f"{manifest.kv_cache.dtype}, at most {dims.context_length} tokens.",
        f"```\npip install 'autosteer-edge[cpu,hub]'\nautosteer-run {PREFIX}{repo} -p 'Hello'\n```",
        "## The gate",
        _gate(manifest),
        "## Checked against PyTorch",
        *_checks(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _gate(manifest: Manifest) -> str:
    if manifest.prober is None or manifest.refusal is None:
        return "This package has none, so it runs only with `--policy off`. Nothing stops or steers an unsafe prompt."
    facts = "\n".join(
        f"- {name.replace('_', ' ')}: {value:.4g}"
        for name, value in sorted(manifest.prober.calibration.items())
        if math.isfinite(value)
    )
    measured = (
        f"Measured by autosteer-fit on held-out data:\n\n{facts}" if facts else "No measurement came with the gate."
    )
    return (
        f"A prompt is unsafe if the prober at layer {manifest.split_layer} scores it above "
        f"{manifest.prober.threshold:g}. Its answer is then steered with strength {manifest.refusal.strength:g}, or "
        f'under `--policy stop` replaced by "{manifest.refusal.text}". {measured}'
    )


def _checks(manifest: Manifest) -> list[str]:
    lines = []
    for provider, checks in manifest.validation.items():
        rows = [(c.name, f"{c.value:.3g}", "reported" if c.limit is None else f"{c.limit:g}") for c in checks]
        lines += [f"On {provider}, when it was exported:", table(("check", "worst", "limit"), rows)]
    return lines
