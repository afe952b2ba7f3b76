"""tools/stamp_pairs.py: pairs and test sets in which a picture decides, drawn here from stamps of one colour each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from stamp_pairs import THEMES, main
from stamp_vlm.stamps import stamps

from autosteer.export.safety.pairs import read_data, read_external


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool writes."""
    shown = tmp_path_factory.mktemp("stamps")
    places = [start for theme in THEMES.values() for start in (*theme.unsafe, *theme.safe)]
    for number in range(40):
        for at, place in enumerate(places):
            file = shown / place / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (8, 8), (number, at, 0, 255)).save(file)
            file.with_suffix(".txt").write_text("A thing.\nfr=Une chose.\n", encoding="utf-8")
    output = shown / "written"
    result = CliRunner().invoke(main, ["--stamps", str(shown), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert {stamp.caption for stamp in stamps(shown)} == {"A thing."}
    return output


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*_*.jsonl")]


def test_autosteer_fit_reads_pairs_and_tests(folder: Path):
    found = read_data([folder / "pairs.jsonl"]).pairs
    assert {pair.channel for pair in found} == {"living", "money", "text"}
    assert all(pair.unsafe.images and pair.safe.images for pair in found)
    assert len(names(folder)) == 6
    for name in names(folder):
        unsafe = name.endswith("_unsafe")
        assert len(read_external([folder / f"{name}.jsonl"], unsafe=unsafe)) == len(rows(folder, name)) > 9


def test_no_picture_and_no_question_of_a_test_is_in_the_pairs(folder: Path):
    fitted = rows(folder, "pairs")
    pictures = {row[key] for row in fitted for key in ("image", "safe_image") if key in row}
    tested = [row for name in names(folder) for row in rows(folder, name)]
    assert not pictures & {image for row in tested for image in row["images"]}
    assert not {row["unsafe"] for row in fitted} & {row["prompt"] for row in tested}


def test_where_a_picture_decides_both_labels_have_the_same_questions(folder: Path):
    for name in THEMES:
        unsafe, benign = ({row["prompt"] for row in rows(folder, f"{name}_{label}")} for label in ("unsafe", "benign"))
        assert unsafe == benign
