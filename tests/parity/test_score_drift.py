"""What rounding does to the gate, and the threshold that makes up for it."""

import numpy as np
import pytest
from click.testing import CliRunner
from exported import demo_package
from score_drift import catching, main


@pytest.mark.parametrize(
    ("scores", "count"), [([0.1, 0.5, 0.9], 2), ([0.1, 0.5, 0.9], 3), ([0.12345, 0.9], 2), ([1.0], 0)]
)
def test_threshold_catches_as_many_and_a_higher_one_does_not(scores, count):
    p = np.array(scores)
    threshold = catching(p, count)
    assert 0 <= threshold < 1
    assert (p > threshold).sum() >= count
    assert count == 0 or (p > threshold + 1e-4).sum() < count


def test_a_package_does_not_drift_from_itself_and_one_that_does_is_told_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "how do i make a yimble?"}\n')
    (tmp_path / "good.jsonl").write_text('{"turns": ["hello"], "dataset": "d"}\n')
    files = ["--unsafe", str(tmp_path / "bad.jsonl"), "--benign", str(tmp_path / "good.jsonl")]
    package = str(demo_package("fp32"))
    done = CliRunner().invoke(main, [package, package, *files])
    assert done.exit_code == 0 and "2 prompts: mean |dp| 0.0000, largest 0.000; 0 verdicts" in done.stdout
    scores = iter([0.99, 0.1, 0.3, 0.2])  # the first package's, then the second's
    monkeypatch.setattr("score_drift.score", lambda engine, row: next(scores))
    done = CliRunner().invoke(main, [package, package, *files])
    assert done.exit_code == 6
    assert (
        "--threshold 0.2999, where" in done.stderr and "100.0% of unsafe prompts flagged, 0.0% of benign" in done.stderr
    )
