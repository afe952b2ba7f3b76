"""One ONNX graph in one onnxruntime session. Every onnxruntime option of the runtime is in this file.

Sessions run one after the other, each with its own threads. Threads that sleep between operators cost a third of the
decode speed on an idle machine. Threads that spin without limit take the cores from the next session and from other
programs, and cost two thirds beside other load. So they spin for microseconds and only inside a run (measured,
docs/design-notes.md). Only one session runs at a time, so all take their activations from one arena.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .cancel import current
from .errors import AutoSteerError, OptionError, PackageError, ProviderError, first_line
from .manifest import GraphSpec, TensorSpec
from .usable_cores import usable_cores

try:
    import onnxruntime as ort
    from onnxruntime import OrtValue as OrtValue  # other modules import it from here, and so show the message below
except ModuleNotFoundError as error:  # no wheel is a hard dependency: on a Jetson, pip would replace NVIDIA's
    raise ImportError(
        "autosteer.runtime needs onnxruntime: pip install 'autosteer-edge[cpu]', or [gpu], or NVIDIA's Jetson wheel"
    ) from error

DeviceName = Literal["auto", "cpu", "cuda"]
Call = Callable[[], None]  # a graph bound to its buffers


@dataclass(frozen=True)
class Device:
    """Where sessions run and where their buffers live."""

    provider: str  # onnxruntime's execution provider
    kind: Literal["cpu", "cuda"]  # onnxruntime's device type for buffers
    threads: int


THREADS_A_CPU = 4  # more make nothing faster, and onnxruntime hangs where the system gives none
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")


def find_device(name: DeviceName, threads: int | None, activations: str | None = None) -> tuple[Device, str]:
    """The device for `name`, and for "auto" the reason if it is the CPU ("" otherwise).

    `threads`: of the CPU, None for all that this process may use. `activations`: numpy name of the type that a package
    computes in, None for any. Raises ProviderError for "cuda" if this onnxruntime cannot run the package there, and for
    unknown names; OptionError for more than THREADS_A_CPU threads for each CPU of the machine.
    """
    if name not in typing.get_args(DeviceName):
        raise ProviderError(f"device {name!r}: choose one of {', '.join(typing.get_args(DeviceName))}")
    most = THREADS_A_CPU * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        each = f"{THREADS_A_CPU} for each CPU of this machine"
        raise OptionError("threads", f" = {threads} is out of range (from 1 to {most}, {each})")
    threads = threads or usable_cores()
    why_not = "" if name == "cpu" else _why_not_cuda(activations)
    if name == "cuda" and why_not:
        raise ProviderError(f"--device cuda: {why_not}, or use --device cpu")
    if name == "cpu" or why_not:
        return Device(CPU, "cpu", threads), why_not
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints the libraries that it does not find
            ort.preload_dlls()  # CUDA libraries from NVIDIA's Python packages, if the system has none
    return Device(CUDA, "cuda", threads), ""


def has_cuda() -> bool:
    """Whether this onnxruntime was built with CUDA. Only a session shows whether it works."""
    return CUDA in ort.get_available_providers()


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU: the driver's device files, a Jetson's, or WSL's."""
    return any(Path(device).exists() for device in GPU_DEVICES)


def _why_not_cuda(activations: str | None) -> str:
    """Why a package cannot run on CUDA here, and what to do about it; "" if it can, as far as one can tell now."""
    if not has_cuda():
        return (
            f"this onnxruntime ({ort.__version__}) has only {', '.join(ort.get_available_providers())}; "
            "install 'autosteer-edge[gpu]'"
        )
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        return f"this onnxruntime ({ort.__version__}) cannot say which operators run there; install 1.26 or newer"
    if activations == "float32":
        return (
            "this package computes in float32, for which onnxruntime's CUDA provider has no attention; "
            "export it again with `autosteer-export --target cuda`"
        )
    return ""


def require_onnxruntime(lowest: str, installed: str = ort.__version__) -> None:
    """Raise ProviderError if this onnxruntime is older than `lowest` ("1.23"), which the package needs."""
    if _version(installed) < _version(lowest):
        advice = "" if has_cuda() else f" (pip install 'onnxruntime>={lowest}')"  # would hide a build with CUDA
        raise ProviderError(f"this package needs onnxruntime {lowest} or newer; {installed} is installed{advice}")


def _version(text: str) -> tuple[int, int]:
    """(major, minor); (0, 0) for text that is not a version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


_ORT_TYPE = {"float32": "float", "float64": "double"}  # numpy's name -> onnxruntime's, where they differ

PROVIDERS: dict[str, list[Any]] = {
    "cpu": [CPU],
    "cuda": [
        (
            CUDA,
            {
                "arena_extend_strategy": "kSameAsRequested",  # as on the CPU
                "use_tf32": "0",  # the refusal head and image tokens need real float32
            },
        ),
        CPU,
    ],
}
ARENAS = {"cpu": "cpu:0", "cuda": "cpu:0;gpu:0"}
# Operators of shape arithmetic, which onnxruntime places on the CPU on purpose. It has CUDA kernels for all of them, so
# one on the CPU does not mean that a kernel is missing.
ON_THE_CPU = frozenset(
    {"Add", "Cast", "Concat", "Div", "Gather", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
)

SPIN_US = 50  # an idle thread's wait for the next operator; most come sooner
SAME_AS_REQUESTED = 1  # onnxruntime's kSameAsRequested
CAN_BOUND_SPINNING = _version(ort.__version__) >= (1, 26)
THREADING = (
    {
        "session.intra_op.allow_spinning": "1",
        "session.intra_op.spin_duration_us": str(SPIN_US),
        "session.force_spinning_stop": "1",  # free the cores for the next session
    }
    if CAN_BOUND_SPINNING
    else {"session.intra_op.allow_spinning": "0"}
)

# What onnxruntime says where memory runs out: of an allocation, of a file that is mapped, of a GPU.
NO_MEMORY = re.compile("bad_alloc|allocate memory|out of memory|available memory of", re.IGNORECASE)


class Subgraph:
    """A loaded graph."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device):
        """Load `path` on `device`.

        Raises PackageError if the file is not a usable graph, or its inputs and outputs are not the manifest's;
        ProviderError if onnxruntime chose another provider without saying so; AutoSteerError if memory runs out.
        """
        self.name, self._outputs = path.stem, [tensor.name for tensor in spec.outputs]
        self.device = device
        try:
            self.session = ort.InferenceSession(str(path), session_options(device), providers=PROVIDERS[device.kind])
        except Exception as err:  # onnxruntime's own hierarchy is not public
            if NO_MEMORY.search(str(err)):
                raise AutoSteerError(f"{path}: not enough memory to load it ({first_line(err)})") from err
            raise PackageError(f"{path}: onnxruntime cannot load it ({first_line(err)})") from err
        if self.session.get_providers()[0] != device.provider:
            raise ProviderError(
                f"{path.name}: onnxruntime fell back to {self.session.get_providers()[0]}; "
                "CUDA, cuDNN or the driver does not fit this onnxruntime"
            )
        self._check_placement(path)
        for ours, theirs in ((spec.inputs, self.session.get_inputs()), (spec.outputs, self.session.get_outputs())):
            said = [(t.name, f"tensor({_ORT_TYPE.get(t.dtype, t.dtype)})", list(t.shape)) for t in ours]
            if said != [(t.name, t.type, t.shape) for t in theirs]:
                raise PackageError(f"{path}: its inputs or outputs are not those of the manifest; export it again")

    def _check_placement(self, path: Path) -> None:
        """Raise ProviderError if onnxruntime put operators of a GPU session on the CPU, which it does silently."""
        if self.device.provider == CPU:
            return
        parts = self.session.get_provider_graph_assignment_info()
        kinds = [node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes()]
        if astray := Counter(kind for kind in kinds if kind not in ON_THE_CPU):
            found = ", ".join(f"{kind} ({count} of them)" for kind, count in astray.items())
            raise ProviderError(
                f"{path.name}: {self.device.provider} of onnxruntime {ort.__version__} has no kernel for {found}: they "
                "would run on the CPU, with copies; export the model again with --target cuda, or use --device cpu"
            )

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once on numpy arrays; outputs by name.

        The arena then frees its unused memory: image graphs take the most, and may not run again.
        """
        options, cancel = shrinking(self.device), current()

        def call(options: ort.RunOptions) -> dict[str, npt.NDArray[Any]]:
            return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs), options), strict=True))

        return cancel.run(options, call) if cancel else call(options)

    def bind(
        self,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
        fresh: Callable[[], Mapping[str, ort.OrtValue]] | None = None,
    ) -> Call:
        """The graph bound to fixed buffers. Each call runs it once, without look-ups or copies. `fresh` gives inputs
        whose shape differs from run to run.
        """
        return BoundGraph(self.session, inputs, outputs, fresh)


class BoundGraph:
    """A graph bound to its buffers, which it keeps alive.

    onnxruntime's binding does not keep an OrtValue's numpy array alive (wheels up to 1.28). Without the references
    here, the strength of a steered answer was read from freed memory, and nothing was steered.
    """

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
        fresh: Callable[[], Mapping[str, ort.OrtValue]] | None,
    ):
        self._session, self._binding, self._fresh = session, session.io_binding(), fresh
        self._buffers = (*inputs.values(), *outputs.values())
        self._latest: Mapping[str, ort.OrtValue] = {}
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self) -> None:
        """Run once; results are in the output buffers."""
        if self._fresh:
            self._latest = self._fresh()
            for name, value in self._latest.items():
                self._binding.bind_ortvalue_input(name, value)
        if (cancel := current()) is None:
            self._session.run_with_iobinding(self._binding)
        else:
            cancel.run(terminable(), lambda options: self._session.run_with_iobinding(self._binding, options))


@functools.cache
def share_arena() -> None:
    """Register one arena of CPU memory, for all sessions of this process that have session.use_env_allocators.

    It grows by the size requested. Arenas that double (the default), one for each session, held 130 MB more for a 0.5B
    model.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": SAME_AS_REQUESTED}))


def shrinking(device: Device) -> ort.RunOptions:
    """Options of a run after which the arena frees its unused memory."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", ARENAS[device.kind])
    return options


def terminable() -> ort.RunOptions:
    """Options of a run that another thread may end.

    The entry is onnxruntime's default. Without it, its Python layer looks for it and raises: 0.1 ms of every run.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "0")
    return options


def session_options(device: Device) -> ort.SessionOptions:
    """onnxruntime's options for one of the chained sessions."""
    share_arena()
    options = ort.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # a pattern for each input length would hold memory
    options.add_session_config_entry("session.use_env_allocators", "1")
    if device.kind != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in THREADING.items():
        options.add_session_config_entry(key, value)
    return options


def buffer(array: npt.NDArray[Any], device: Device) -> ort.OrtValue:
    """An onnxruntime buffer on `device` with the content of `array`. On the CPU it shares the array's memory."""
    return ort.OrtValue.ortvalue_from_numpy(array, device.kind, 0)


def empty(spec: TensorSpec, shape: tuple[int, ...], device: Device) -> ort.OrtValue:
    """An uninitialised buffer for one output of a graph."""
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype), device.kind, 0)
