"""autosteer-check --host: each fact is in a file that a test can write."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosteer.runtime.host import describe_host

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1 kB\nMemAvailable:    8388608 kB\n"
ORIN = {
    "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd42\n\nprocessor\t: 1\n",
    "proc/meminfo": MEMINFO,
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}',
    "usr/bin/tegrastats": "",
    "dev/nvgpu": "",
}


def root_with(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_this_machine_is_described():
    facts = describe_host()
    assert "CPUExecutionProvider" in facts["providers"] and "GiB" in facts["memory"]
    assert "l4t" not in facts


def test_a_jetson_is_described(tmp_path):
    facts = describe_host(root_with(tmp_path, ORIN))
    assert facts["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert facts["cores"].startswith("2, ") and facts["memory"] == "16.0 GiB, 8.0 of it free"
    assert (facts["l4t"], facts["cuda"], facts["power mode"]) == ("36.4.3", "12.6.68", "2 MAXN_SUPER")
    assert (facts["tegrastats"], facts["gpu"]) == ("present", "NVIDIA")
    assert facts["install"].startswith("pip install ./onnxruntime_gpu-1.26.0-cp3") and "[gpu]" not in facts["install"]


@pytest.mark.parametrize(
    ("name", "text", "fact", "expected"),
    [
        ("etc/nvpmodel.conf", "", "power mode", "2"),
        ("var/lib/nvpmodel/status", "", "power mode", "unknown"),
        ("usr/local/cuda/version.json", "{", "cuda", "unknown"),
        ("usr/local/cuda/version.json", "[]", "cuda", "unknown"),
        ("proc/meminfo", "", "memory", "unknown"),
    ],
)
def test_what_a_file_does_not_say_is_unknown(tmp_path, name, text, fact, expected):
    facts = describe_host(root_with(tmp_path, ORIN | {name: text}))
    assert facts[fact] == expected


def test_an_older_jetson_has_its_cuda_version_in_a_text(tmp_path):
    files = {name: text for name, text in ORIN.items() if "version.json" not in name}
    root = root_with(tmp_path, files | {"usr/local/cuda/version.txt": "CUDA Version 10.2.300\n"})
    assert describe_host(root)["cuda"] == "10.2.300"


def test_a_jetson_with_cuda_13_installs_from_pypi(tmp_path):
    root = root_with(tmp_path, ORIN | {"usr/local/cuda/version.json": '{"cuda": {"version": "13.0.0"}}'})
    assert "'.[gpu]'" in describe_host(root)["install"]


def test_a_pc_is_no_jetson(tmp_path):
    files = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: A fast one @ 3 GHz\n", "proc/meminfo": MEMINFO}
    facts = describe_host(root_with(tmp_path, files))
    assert (facts["cpu"], facts["gpu"]) == ("A fast one @ 3 GHz", "none of NVIDIA's")
    assert facts["install"] == "pip install '.[cpu]'"
    assert not {"board", "l4t", "cuda", "power mode", "tegrastats"} & facts.keys()
    with_gpu = describe_host(root_with(tmp_path, files | {"dev/nvidiactl": ""}))
    assert "'.[gpu]'" in with_gpu["install"]
