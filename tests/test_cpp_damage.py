"""Tier 5: a package that Python refuses is refused by the C++ runtime, with the same exit code."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from cpp_runtime import cli, use_byte_level_words

from autosteer.runtime import Engine
from autosteer.runtime.errors import AutoSteerError


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change values of the manifest; keys are paths joined by `__`."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / "autosteer.json").read_text())
        for path, value in changes.items():
            *keys, last = [int(k) if k.isdigit() else k for k in path.split("__")]
            target = functools.reduce(lambda d, k: d[k], keys, data)
            if value is DELETED:
                del target[last]
            else:
                target[last] = value
        (folder / "autosteer.json").write_text(json.dumps(data))

    return apply


DELETED = object()


def flip(name: str) -> Callable[[Path], None]:
    """Flip one bit in the middle of a file."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


def with_hash(name: str, content: bytes) -> Callable[[Path], None]:
    """Replace a graph by `content` and correct its hash, as an attacker would."""

    def apply(folder: Path) -> None:
        (folder / f"{name}.onnx").write_bytes(content)
        edit(**{f"graphs__{name}__sha256": hashlib.sha256(content).hexdigest()})(folder)

    return apply


def swap_graphs(folder: Path) -> None:
    """The prober's file in place of the refusal head's, with its right hash."""
    with_hash("refusal_head", (folder / "prober.onnx").read_bytes())(folder)


def raw(text: bytes) -> Callable[[Path], None]:
    """Other bytes in place of the manifest."""
    return lambda folder: (folder / "autosteer.json").write_bytes(text) and None


def twice(folder: Path) -> None:
    """A key given twice."""
    text = (folder / "autosteer.json").read_text()
    (folder / "autosteer.json").write_text(text.replace("{", '{"guarded": false, ', 1))


def another_graph(folder: Path) -> None:
    """A graph that this runtime would leave alone."""
    manifest = json.loads((folder / "autosteer.json").read_text())
    manifest["graphs"]["reader"] = manifest["graphs"]["prober"]
    (folder / "autosteer.json").write_text(json.dumps(manifest))


def prefill(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """A package with prefill graphs in its place, damaged."""

    def rebuilt(folder: Path) -> None:
        use_byte_level_words(folder, toy.build(folder, videos=True, prefill=True))
        Engine.load(folder, device="cpu", threads=1)
        damage(folder)

    return rebuilt


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / "autosteer.json").unlink(),
    "no JSON": raw(b"{"),
    "an array": raw(b"[]"),
    "not UTF-8": raw(b'{"format_version": "\xff"}'),
    "other version": edit(format_version=2),
    "version as text": edit(format_version="1"),
    "version as a fraction": edit(format_version=1.5),
    "key given twice": twice,
    "unknown key": edit(gate="open"),
    "unknown key inside": edit(prober__off=True),
    "key is missing": edit(split_layer=DELETED),
    "wrong type": edit(guarded=1),
    "number as text": edit(dims__hidden_size="32"),
    "fraction for a count": edit(dims__hidden_size=32.5),
    "boolean for a number": edit(prober__threshold=True),
    "gate removed": edit(prober=None),
    "gate denied": edit(guarded=False),
    "threshold above one": edit(prober__threshold=1.5),
    "threshold of one": edit(prober__threshold=1.0),
    "weights without a hash": lambda folder: (folder / "weights.bin").write_bytes(b"numbers"),
    "offset from the start": edit(prober__token_offset=0),
    "strength zero": edit(refusal__strength=0.0),
    "no refusal text": edit(refusal__text=" "),
    "graph is missing": edit(graphs__prober=DELETED),
    "split out of range": edit(split_layer=2),
    "other layers": edit(graphs__decoder_upper__layers=[0, 2]),
    "half a prefill copy": prefill(edit(graphs__prefill_upper=DELETED)),
    "other layers of a prefill copy": prefill(edit(graphs__prefill_lower__layers=[0, 2])),
    "prefill copy damaged": prefill(flip("prefill_lower.onnx")),
    "graph of another runtime": another_graph,
    "path climbs": edit(graphs__prober__file="../prober.onnx"),
    "path is absolute": edit(graphs__prober__file="/etc/passwd"),
    "path with a backslash": edit(graphs__prober__file="..\\prober.onnx"),
    "tokenizer without a hash": edit(prompt__tokenizer="autosteer.json"),
    "id outside the vocabulary": edit(prompt__begin__0__id=99),
    "piece of another kind": edit(prompt__begin__0__kind="magic"),
    "other sizes": edit(dims__hidden_size=64),
    "no sizes": edit(dims__head_dim=0),
    "other cache type": edit(kv_cache__dtype="float16"),
    "cache type that is not the graphs'": edit(kv_cache__dtype="int8"),
    "image of another kind": edit(image__kind="centre_crop"),
    "video denied": edit(video=None),
    "video without a place": edit(prompt__user__video=[]),
    "video too large": edit(video__pooled_side=3),
    "video of no size": edit(video__pooled_side=0),
    "video divides by zero": edit(video__std=[1.0, 0.0, 1.0]),
    "unknown key of a video": edit(video__fps=30),
    "hash differs": edit(graphs__prober__sha256="0" * 64),
    "graph damaged": flip("prober.onnx"),
    "tokenizer damaged": flip("tokenizer.json"),
    "file is missing": lambda folder: (folder / "decoder_upper.onnx").unlink(),
    "folder for a file": lambda folder: ((folder / "lm_head.onnx").unlink(), (folder / "lm_head.onnx").mkdir()),
    "no graph": with_hash("prober", b"not onnx"),
    "empty graph": with_hash("prober", b""),
    "another graph": swap_graphs,
    "other names": edit(graphs__prober__inputs__0__name="x", graphs__prober__outputs__0__name="y"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_package_is_refused_with_the_same_error(built, cpp_package, tmp_path, name):
    """Both runtimes refuse, with exit code 3, one line, and nothing on stdout."""
    folder = Path(shutil.copytree(cpp_package, tmp_path / "package"))
    DAMAGE[name](folder)
    with pytest.raises(AutoSteerError) as refused:
        Engine.load(folder, device="cpu", threads=1)
    done = cli(built, folder, "--prompt", "red")
    assert (done.returncode, done.stdout) == (refused.value.exit_code, ""), done.stderr
    assert done.returncode == 3
    assert done.stderr.startswith("autosteer-cli: error: ") and done.stderr.count("\n") == 1


def test_no_folder_is_a_package_error(built, tmp_path):
    assert cli(built, tmp_path / "nowhere", "--prompt", "red").returncode == 3
    (tmp_path / "file").write_text("")
    assert cli(built, tmp_path / "file", "--prompt", "red").returncode == 3


def test_package_without_a_gate_runs_only_when_asked_to(built, tmp_path):
    use_byte_level_words(tmp_path / "package", toy.build(tmp_path / "package", guarded=False))
    assert cli(built, tmp_path / "package", "--prompt", "red").returncode == 3
    assert cli(built, tmp_path / "package", "--prompt", "red", "--policy", "off").stdout == "orangeyellowgreen\n"
