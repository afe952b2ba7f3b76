"""What onnxruntime-gpu would do with a package, on a machine without a GPU: where each operator goes, what is copied.

    pip install --no-deps --target build/ort-gpu onnxruntime-gpu      # the wheel alone: 250 MB, no CUDA
    PYTHONPATH=build/ort-gpu python tools/cuda/cuda_dry_run.py PACKAGE

onnxruntime's own CUDA provider is loaded on a stand-in for NVIDIA's libraries (fake_cuda.c; needs gcc, nm and readelf),
and the real Engine answers a prompt with it. Placement, buffers and copies are what they would be. Kernels compute
nothing: numbers that come out mean nothing, and no time is worth measuring. Pictures are left out: cuDNN is not faked.
What the runtime would refuse (a package for the CPU) is shown, too.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import onnxruntime as ort

from autosteer.runtime import engine as engine_module
from autosteer.runtime import subgraph
from autosteer.runtime.console import dumps, table
from autosteer.runtime.engine import Engine
from autosteer.runtime.stats import Stats
from autosteer.runtime.subgraph import Subgraph
from autosteer.runtime.text import Message

FAKED = "AUTOSTEER_FAKE_CUDA"  # set in the process that runs on the stand-in
PROVIDER = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
SOURCE = Path(__file__).parent / "fake_cuda.c"
KINDS = {"to device": 1, "to host": 2}  # cudaMemcpyKind
ANSWER = 16  # tokens there is room for
PROMPT = "Name three colours."


def build(folder: Path) -> None:
    """Compile the stand-in: a shared library in `folder` for each of NVIDIA's that the provider names."""
    symbols = re.findall(r" U (\w+)(?:@(\S+))?$", _said("nm", "-D", "--undefined-only", PROVIDER), re.MULTILINE)
    written = set(re.findall(r"\b(\w+)\(", SOURCE.read_text(encoding="utf-8")))
    for library in re.findall(r"NEEDED.*\[(lib(?:cu|nv)\S+)\]", _said("readelf", "-d", PROVIDER)):
        driver = library.startswith("libcuda.")  # its symbols have no versions
        wanted = [name for name, version in symbols if version == library or (driver and re.match("cu[A-Z]", name))]
        rest = "".join(f"int {name}() {{ return 0; }}\n" for name in wanted if name not in written)
        code, versions = folder / f"{library}.c", folder / f"{library}.map"
        code.write_text(f'#include "{SOURCE}"\n{rest}', encoding="utf-8")
        versions.write_text(f"{library} {{ *; }};\n", encoding="utf-8")
        _said(
            *("gcc", "-w", "-shared", "-fPIC", code, "-o", folder / library),
            *(f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"),
        )


def _said(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


def placement(engine: Engine) -> dict[str, dict[str, dict[str, int]]]:
    """How many operators of each kind every provider has, by graph."""
    places: dict[str, dict[str, dict[str, int]]] = {}
    for name, graph in engine.graphs.items():
        if graph.device.kind == "cpu":
            continue
        counts: dict[str, Counter[str]] = {}
        for part in graph.session.get_provider_graph_assignment_info():
            counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        places[name] = {provider: dict(sorted(kinds.items())) for provider, kinds in sorted(counts.items())}
    return places


class Meter:
    """Counts what happens between two readings."""

    def __init__(self) -> None:
        runtime = next(line for line in Path("/proc/self/maps").read_text().split() if "/libcudart.so" in line)
        library = ctypes.CDLL(runtime)
        self._copies, self._bytes = ((ctypes.c_long * 5).in_dll(library, f"fake_{n}") for n in ("copies", "bytes"))
        self._launches, self._waits = (ctypes.c_long.in_dll(library, f"fake_{name}") for name in ("launches", "waits"))
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        copies = {f"copies {way}": self._copies[kind] for way, kind in KINDS.items()}
        sizes = {f"bytes {way}": self._bytes[kind] for way, kind in KINDS.items()}
        return copies | sizes | {"kernels": self._launches.value, "waits": self._waits.value}

    def read(self) -> dict[str, int]:
        """Since the last reading."""
        before, self._before = self._before, self._now()
        return {name: count - before[name] for name, count in self._before.items()}


def crossings(engine: Engine) -> dict[str, dict[str, int]]:
    """What crosses between host and device, by stage of an answer to PROMPT."""
    meter, stages = Meter(), {}
    prompt = engine.encoder.prepare([Message.user(PROMPT)], Stats())
    stages["embed the prompt"] = meter.read()
    request = engine.request(prompt, ANSWER, Stats())
    stages["caches"] = meter.read()
    request.prefill_lower(engine.policy() if engine.manifest.guarded else engine.policy("off"))
    stages["lower half, gate"] = meter.read()
    request.prefill_upper(0.0)
    stages["upper half, first token"] = meter.read()
    for stage in ("a token", "another token"):
        request.decode_step(0)
        stages[stage] = meter.read()
    return stages


@click.command(help=__doc__)
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(package: Path, as_json: bool) -> None:
    """See the module."""
    if not PROVIDER.exists():
        raise click.UsageError(f"onnxruntime {ort.__version__} here is without CUDA; see --help")
    if FAKED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            environment = os.environ | {FAKED: "1", "LD_LIBRARY_PATH": folder}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    patch.object(engine_module, "check_gate").start()  # nothing is computed here, so the gate's proof cannot hold
    Subgraph._check_placement = lambda self, path: None  # type: ignore[method-assign]  # shown, not checked
    subgraph._why_not_cuda = lambda activations: ""
    engine = Engine.load(package, device="cuda", threads=1)
    facts: dict[str, Any] = {"onnxruntime": ort.__version__, "placement": placement(engine)}
    facts["crossings"] = crossings(engine)
    click.echo(dumps(facts) if as_json else text(facts))


def text(facts: dict[str, Any]) -> str:
    """The two tables, for people."""
    places = [
        (graph, provider, ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
        for graph, providers in facts["placement"].items()
        for provider, kinds in providers.items()
    ]
    head = ("stage", *facts["crossings"]["caches"])
    stages = [(stage, *map(str, counts.values())) for stage, counts in facts["crossings"].items()]
    return f"{table(('graph', 'provider', 'operators'), places)}\n\n{table(head, stages)}"


if __name__ == "__main__":
    main()
