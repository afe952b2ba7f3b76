"""Which onnxruntime a package needs at least; tests/parity/test_onnxruntime_versions.py checks that it is enough."""

import pytest

from autosteer.export.floor import NEEDS, lowest_onnxruntime
from autosteer.export.graphs.quantize import recipe


@pytest.mark.parametrize(
    ("precision", "options", "lowest"),
    [
        ("fp32", {}, "1.20"),
        ("fp16", {}, "1.20"),
        ("fp32", {"image": "int8"}, "1.20"),
        ("int8", {}, "1.23"),
        ("int8", {"block_size": 128}, "1.23"),
        ("int4", {}, "1.23"),
        ("int4", {"head_bits": 4}, "1.23"),
        ("int4", {"prefill": "int8"}, "1.23"),
        ("int4", {"caches": "int8"}, "1.27"),
        ("int4", {"prefill": "int8", "caches": "int8"}, "1.27"),
        ("fp32", {"caches": "int8"}, "1.27"),
        ("fp16", {"target": "cuda"}, "1.26"),
        ("int4", {"target": "cuda"}, "1.26"),
    ],
)
def test_a_package_needs_the_onnxruntime_that_its_most_demanding_part_needs(precision, options, lowest):
    assert lowest_onnxruntime(recipe(precision, **options)) == lowest


@pytest.mark.parametrize(("options", "lowest"), [({}, "1.24"), ({"caches": "int8"}, "1.27")])
def test_windows_need_a_newer_one(options, lowest):
    assert lowest_onnxruntime(recipe("fp32", **options), windowed=True) == lowest


def test_the_highest_need_comes_first_because_the_first_that_applies_is_taken():
    versions = [tuple(map(int, version.split("."))) for version, _ in NEEDS]
    assert versions == sorted(versions, reverse=True)
