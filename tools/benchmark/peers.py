"""The same weights for other runtimes, at the bits of the package they are compared with.

Peers live in the interpreter that `--peer-python` names: they bring their own onnxruntime, and llama.cpp is compiled
there. What is made of a checkpoint is kept and used again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import towers
from .weights import Matrix, Weights, onnx_weights

TOOLS = Path(__file__).resolve().parents[1]
NEEDS = {  # modules, and how to install them
    "genai": (
        ("onnxruntime_genai", "onnx_ir", "torch", "transformers"),
        "onnxruntime-genai onnx-ir torch transformers",
    ),
    "llama.cpp": (("llama_cpp", "gguf", "safetensors", "torch"), "llama-cpp-python gguf safetensors torch"),
    "torch": (("torch", "transformers"), "torch transformers"),
}
GGUF_TYPES = {4: "Q4_0", 8: "Q8_0", 32: "F32"}  # bits of the package's body -> llama-quantize's name
TOWER_TYPE = "Q8_0"  # 8 bits, as our towers; F16 is about as fast


class PeerError(Exception):
    """Why a peer is not measured, in one line."""


@dataclass(frozen=True)
class Configuration:
    """One row of the report: what a worker loads."""

    name: str
    kind: str  # a key of worker.SUBJECTS
    path: Path
    python: str
    weights: Weights | None  # None: not read back (torch: said by its dtype)
    options: dict[str, Any] = field(default_factory=dict)
    drafts: bool = False  # speculates

    def spec(self, threads: int, max_tokens: int) -> str:
        """The worker's argument."""
        return json.dumps(
            {"kind": self.kind, "path": str(self.path), "threads": threads, "max_tokens": max_tokens, **self.options}
        )


def configurations(
    peer: str, checkpoint: Path, body: Matrix, python: str, threads: int, work: Path, *, pictures: bool = False
) -> list[Configuration]:
    """A peer's rows; with `pictures`, those that take them. Raises PeerError where it is not installed, or cannot run
    the checkpoint.
    """
    _require(peer, python)
    work.mkdir(parents=True, exist_ok=True)
    if pictures:
        if peer != "llama.cpp":
            raise PeerError(f"{peer}: here it reads texts only, and --image was given")
        return _mtmd(checkpoint, body, python, work)
    return {"genai": _genai, "llama.cpp": _llama_cpp, "torch": _torch}[peer](checkpoint, body, python, threads, work)


def gguf(file: Path, python: str) -> list[Configuration]:
    """llama.cpp's rows for a GGUF file as it is: its own bits, of the same weights. Raises PeerError as above."""
    _require("llama.cpp", python)
    listed = json.loads(_make("llama.cpp", python, "-m", "benchmark.gguf_file", "list", file))
    weights = Weights(tuple(Matrix(**matrix) for matrix in listed))
    name = f"llama.cpp {file.stem}"
    return [
        Configuration(name, "llama.cpp", file, python, weights),
        Configuration(f"{name}, drafting", "llama.cpp drafting", file, python, weights, drafts=True),
    ]


def _require(peer: str, python: str) -> None:
    """Raise PeerError unless the interpreter has what the peer needs."""
    modules, packages = NEEDS[peer]
    found = _run(python, "-c", f"import importlib.util as u; print([m for m in {modules!r} if not u.find_spec(m)])")
    if found.stdout.strip() != "[]":
        raise PeerError(f"{peer}: {python} lacks {found.stdout.strip()}; {python} -m pip install {packages}")


def _genai(checkpoint: Path, body: Matrix, python: str, threads: int, work: Path) -> list[Configuration]:
    """Its builder's graph with `prune_lm_head`: logits of the last row only, as ours. Spinning threads are its default;
    which is faster depends on what else runs, so both are rows. Blocks are symmetric, its default: with zero points
    its builder (0.18) writes a tied embedding that does not load, and they cost no time.
    """
    precision = {4: "int4", 8: "int8", 32: "fp32"}.get(body.bits)
    if precision is None:
        raise PeerError(f"genai: has no {body.bits}-bit weights on the CPU")
    options = ["prune_lm_head=true"]
    if body.block_size:
        options += [f"block_size={body.block_size}", "accuracy_level=4"]
    folder = work / "-".join(["genai", checkpoint.name, precision, *(option.replace("=", "_") for option in options)])

    def build(to: Path) -> None:
        arguments: list[str | Path] = ["-i", checkpoint, "-o", to, "-p", precision, "-e", "cpu", "-c", work / "cache"]
        _make("genai", python, "-m", "onnxruntime_genai.models.builder", *arguments, "--extra_options", *options)

    _once(folder, build)
    rows = []
    for spinning in (False, True):
        variant = folder.with_name(f"{folder.name}-t{threads}-spin{int(spinning)}")
        _with_session_options(folder, variant, threads, spinning=spinning)
        name = f"genai {precision}{'' if spinning else ', not spinning'}"
        rows.append(Configuration(name, "genai", variant, python, onnx_weights(variant / "model.onnx")))
    return rows


def _with_session_options(folder: Path, variant: Path, threads: int, *, spinning: bool) -> None:
    """The same files under another genai_config.json."""
    variant.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if not (variant / file.name).exists() and file.name != "genai_config.json":
            (variant / file.name).hardlink_to(file)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    session = config["model"]["decoder"]["session_options"]
    session["intra_op_num_threads"] = threads
    session["session.intra_op.allow_spinning"] = str(int(spinning))
    (variant / "genai_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _llama_cpp(checkpoint: Path, body: Matrix, python: str, threads: int, work: Path) -> list[Configuration]:
    """llama.cpp's own quantisation of the same weights; its blocks are always of 32."""
    return gguf(_gguf_file(checkpoint, body, python, work, ("llama", "qwen2", "qwen3")), python)


def _mtmd(checkpoint: Path, body: Matrix, python: str, work: Path) -> list[Configuration]:
    """The same with its tower, at 8 bits as ours, by libmtmd."""
    text = gguf(_gguf_file(checkpoint, body, python, work, tuple(towers.FAMILIES)), python)[0]
    tower = _once(
        work / checkpoint.name / f"mmproj-{TOWER_TYPE}.gguf",
        lambda to: _make("llama.cpp", python, "-m", "benchmark.mmproj_file", checkpoint, to, TOWER_TYPE),
    )
    return [replace(text, kind="llama.cpp mtmd", options={"mmproj": str(tower), "turn": towers.of(checkpoint).turn})]


def _gguf_file(checkpoint: Path, body: Matrix, python: str, work: Path, known: tuple[str, ...]) -> Path:
    kind = GGUF_TYPES.get(body.bits)
    model_type = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind is None or model_type not in known:
        raise PeerError(f"llama.cpp: no GGUF for {model_type} at {body.bits} bits")
    return _once(
        work / checkpoint.name / f"{kind}.gguf",
        lambda to: _make("llama.cpp", python, "-m", "benchmark.gguf_file", "write", checkpoint, to, kind),
    )


def _torch(checkpoint: Path, body: Matrix, python: str, threads: int, work: Path) -> list[Configuration]:
    return [
        Configuration(f"torch {dtype}", "torch", checkpoint, python, None, {"dtype": dtype})
        for dtype in ("bfloat16", "float32")
    ]


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made if it is not there; under another name first, so that nothing half-made is taken for it."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(path)
    return path


def _make(peer: str, python: str, *arguments: str | Path) -> str:
    done = _run(python, *map(str, arguments))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerError(f"{peer}: {' '.join(map(str, arguments[:3]))} failed ({last})")
    return done.stdout


def _run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False, env=environment())


def environment() -> dict[str, str]:
    """Ours, with this folder's parent on the path: `python -m benchmark.worker` works in any interpreter."""
    path = os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"PYTHONPATH": path}
