"""tools/hub_to_jsonl.py: what it writes is what autosteer-eval reads."""

from __future__ import annotations

from hub_to_jsonl import write_rows
from PIL import Image

from autosteer.runtime.evaluation.datasets import DataSource, read_rows
from autosteer.runtime.evaluation.grading import Gold


def test_rows_with_pictures_of_mmmu_and_realworldqa_are_read(tmp_path):
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    mmmu = {"id": "x_1", "question": "<image 1> What?", "options": "['a', 'b']", "answer": "A", "image_1": red}
    world = {"image": blue, "question": "How many?", "answer": "2", "image_path": "1.webp"}
    assert write_rows([mmmu | {"image_2": None}], tmp_path, "Art-validation") == 1
    assert write_rows([world, world], tmp_path, "test") == 2
    rows = read_rows([DataSource(tmp_path / "Art-validation.jsonl"), DataSource(tmp_path / "test.jsonl")])
    assert [row.gold for row in rows] == [Gold("choice", ("A",), ("a", "b")), *[Gold("short", ("2",))] * 2]
    shown = [Image.open(row.messages[0].images[0]) for row in rows]
    assert [image.getpixel((0, 0)) for image in shown] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
