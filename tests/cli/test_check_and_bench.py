"""autosteer-check and autosteer-bench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autosteer.runtime import Manifest
from autosteer.runtime.manifest import Golden


@pytest.fixture
def golden_package(copy_of_package: Path) -> Path:
    golden = Golden("red", (), None, 0.1, "pass", (6, 7, 8, 31))
    replace(Manifest.load(copy_of_package), golden=(golden,)).save(copy_of_package)
    return copy_of_package


def test_check_of_a_whole_package(call, golden_package):
    done = call("autosteer-check", golden_package, "--device", "cpu")
    assert done.returncode == 0 and "no golden prompt is unsafe at the package's threshold" in done.stderr  # the toy's
    assert "| verdicts that differ" in done.stdout and "FAILED" not in done.stdout


def test_check_that_fails_is_exit_code_6(call, golden_package):
    manifest = Manifest.load(golden_package)
    replace(manifest, golden=(replace(manifest.golden[0], token_ids=(6, 9)),)).save(golden_package)
    done = call("autosteer-check", golden_package, "--device", "cpu")
    assert done.returncode == 6
    assert "answers that differ: not as on the exporting machine" in done.stderr and "FAILED" in done.stdout


def test_check_as_json(call, golden_package):
    done = call("autosteer-check", golden_package, "--device", "cpu", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 0 and all(set(c) == {"name", "value", "limit", "passed"} for c in checks)


def test_check_of_the_host(call):
    assert "CPUExecutionProvider" in json.loads(call("autosteer-check", "--host", "--json").stdout)["providers"]


def test_bench_prints_a_table_or_json(call, golden_package):
    few = ("--prompt-tokens", 4, "--new-tokens", 3, "--rounds", 1, "--device", "cpu")
    done = call("autosteer-bench", golden_package, *few)
    assert done.returncode == 0 and "decode, tok/s" in done.stdout and "GB/s read" in done.stdout
    assert json.loads(call("autosteer-bench", golden_package, *few, "--json").stdout)["read_gb_s"] > 0


def test_check_of_nothing_is_wrong_usage(call):
    assert call("autosteer-check").returncode == 2
