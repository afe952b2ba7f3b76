"""Tux Paint's stamps (Debian's tuxpaint-stamps-default, GPL): pictures with a sentence each, in 16 folders."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HELD_OUT = 0.2
NAMES = {"naturalforces": "natural forces", "household": "household things", "symbols": "symbols", "town": "buildings"}


@dataclass(frozen=True)
class Stamp:
    """A picture. `place`: its path below the folder of stamps, which says what it shows."""

    file: Path
    place: str
    caption: str

    @property
    def category(self) -> str:
        """What its topmost folder holds, in words."""
        folder = self.place.split("/")[0]
        return NAMES.get(folder, folder)

    @property
    def held_out(self) -> bool:
        """Whether neither the projector nor the gate learns from it. Drawn from its path alone."""
        return random.Random(self.place).random() < HELD_OUT

    def image(self) -> Image.Image:
        """RGB, on white."""
        picture = Image.open(self.file).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def stamps(folder: Path) -> list[Stamp]:
    """All pictures with a sentence. Raises FileNotFoundError if there are none."""
    found = []
    for file in sorted(folder.rglob("*.png")):
        sentence = file.with_suffix(".txt")
        if sentence.is_file():
            caption = sentence.read_text(encoding="utf-8").splitlines()[0].strip()
            found.append(Stamp(file, file.relative_to(folder).as_posix(), caption))
    if not found:
        raise FileNotFoundError(f"{folder} has no stamps; install Debian's tuxpaint-stamps-default")
    return found
