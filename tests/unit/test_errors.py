"""What another library's exception says, as part of one of our lines."""

import pytest

from autosteer.runtime.errors import LONGEST_REASON, first_line


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("no such file", "no such file"),
        ("\n\n  it failed.\nTraceback", "it failed"),
        ("2 errors:\n  a is missing.\n  b is missing.", "2 errors: a is missing"),
        ("it ends with a colon:", "it ends with a colon:"),
        ("x" * (LONGEST_REASON + 1), "x" * LONGEST_REASON),
        (" \n", "ValueError"),
        ("...", "ValueError"),
    ],
)
def test_an_exception_becomes_one_line(said, line):
    assert first_line(ValueError(said)) == line
