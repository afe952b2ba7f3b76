"""What decides how packages run on this machine, for autosteer-check --host and autosteer-bench.

What files say is read below a root folder, which a test can make. A Jetson has /etc/nv_tegra_release, the line
"# R36 (release), REVISION: 4.3, ..."; its power modes are in /etc/nvpmodel.conf, the present one in
/var/lib/nvpmodel/status.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import onnxruntime as ort

from .subgraph import GPU_DEVICES
from .usable_cores import usable_cores

UNKNOWN = "unknown"
ROOT = Path("/")
INSTALL_CPU = "pip install '.[cpu]'"  # in a clone, as all three
INSTALL_GPU = "pip install '.[gpu]' 'onnxruntime-gpu[cuda,cudnn]'"
CUDA_OF_PYPI = 13  # for which PyPI has ARM wheels of onnxruntime-gpu; NVIDIA has those for the CUDA of older Jetsons


def describe_host(root: Path = ROOT) -> dict[str, str]:
    """Facts by name. On a Jetson, those of the board, too; last, how to install the runtime here."""
    info = _text(root / "proc/cpuinfo")
    board = _text(root / "proc/device-tree/model").rstrip("\0")
    facts = {
        "machine": platform.machine(),
        "board": board,
        "cpu": _found(r"^model name\s*: (.+)$", info) or _found(r"^Hardware\s*: (.+)$", info) or UNKNOWN,
        "cores": f"{len(re.findall(r'^processor', info, re.MULTILINE)) or UNKNOWN}, {usable_cores()} for this process",
        "memory": _memory(root),
        "gpu": "NVIDIA" if any((root / device.lstrip("/")).exists() for device in GPU_DEVICES) else "none of NVIDIA's",
        **_jetson(root),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "providers": ", ".join(ort.get_available_providers()),
    }
    return {name: fact for name, fact in facts.items() if fact} | {"install": _install(facts)}


def _jetson(root: Path) -> dict[str, str]:
    """L4T's version, CUDA's, the power mode, and whether tegrastats is there; empty on other machines."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    if not release:
        return {}
    mode = _found(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status"))
    name = _found(rf"POWER_MODEL\s+ID={mode}\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf")) if mode else ""
    return {
        "l4t": f"{release[1]}.{release[2]}",
        "cuda": _cuda(root) or UNKNOWN,
        "power mode": f"{mode} {name}".strip() or UNKNOWN,
        "tegrastats": "present" if (root / "usr/bin/tegrastats").exists() else "absent",
    }


def _cuda(root: Path) -> str:
    """The version of /usr/local/cuda; "" if it does not say."""
    text = _text(root / "usr/local/cuda/version.json")
    try:
        return str(json.loads(text)["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return _found(r"CUDA Version ([\d.]+)", _text(root / "usr/local/cuda/version.txt"))


def _install(facts: dict[str, str]) -> str:
    """The line that installs the runtime here, in a clone."""
    if "l4t" in facts and int(_found(r"^(\d+)", facts["cuda"]) or 0) < CUDA_OF_PYPI:
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        wheel = f"onnxruntime_gpu-1.26.0-{tag}-{tag}-linux_aarch64.whl"
        return f"pip install ./{wheel} .  # the wheel: NVIDIA's for this JetPack, 1.26.0 or newer"
    return INSTALL_GPU if facts["gpu"] == "NVIDIA" else INSTALL_CPU


def _memory(root: Path) -> str:
    text = _text(root / "proc/meminfo")
    total, free = (_found(rf"^{name}:\s+(\d+) kB$", text) for name in ("MemTotal", "MemAvailable"))
    return f"{int(total) / 2**20:.1f} GiB, {int(free) / 2**20:.1f} of it free" if total and free else UNKNOWN


def _text(file: Path) -> str:
    """A small file's text; "" if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else ""
