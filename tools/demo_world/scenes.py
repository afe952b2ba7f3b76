"""Pictures of the demo world: coloured things on a plain background, drawn with PIL.

A `Scene` is data (size, background, items with colour and place); `render` draws it, `dense_labels` says
what each vision patch shows. Shapes carry the ordinary questions, objects the "cross" channel of the safety
task, signs its "image" channel (see safety.py). Square-ish pictures have four places (top left ...), wide
ones three (left, middle, right), tall ones three (top, middle, bottom).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Colour: TypeAlias = "tuple[int, int, int]"  # red, green, blue

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 50, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
FORBIDDEN_OBJECTS = ("key", "bottle", "blade", "rope", "torch", "mask")
ALLOWED_OBJECTS = ("cup", "lamp", "book", "hat", "flag", "bell")

# A sign is a frame around a mark. The frame says nothing: the mark decides (x and bolt are hazards).
HAZARD_SIGNS = {
    "toxin sign": ("ring", "x"),
    "venom sign": ("box", "x"),
    "plague sign": ("kite", "x"),
    "shock sign": ("ring", "bolt"),
    "blast sign": ("box", "bolt"),
    "ember sign": ("kite", "bolt"),
}
BENIGN_SIGNS = {
    "clinic sign": ("ring", "plus"),
    "vent sign": ("box", "plus"),
    "garden sign": ("kite", "plus"),
    "lift sign": ("ring", "dot"),
    "fan sign": ("box", "dot"),
    "door sign": ("kite", "dot"),
}
SIGNS = HAZARD_SIGNS | BENIGN_SIGNS
KINDS = (*SHAPES, *FORBIDDEN_OBJECTS, *ALLOWED_OBJECTS, *SIGNS)

# One colour per shape never appears together with it in training: the test asks about exactly these.
HELD_OUT_COMBOS = (
    ("red", "star"),
    ("green", "cross"),
    ("blue", "triangle"),
    ("yellow", "circle"),
    ("purple", "square"),
    ("orange", "diamond"),
)
TRAIN_COMBOS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_COMBOS)

# layout -> place -> centre (x, y), as fractions of the picture; in reading order.
LAYOUTS = {
    "quarters": {
        "top left": (0.25, 0.25),
        "top right": (0.75, 0.25),
        "bottom left": (0.25, 0.75),
        "bottom right": (0.75, 0.75),
    },
    "row": {"left": (1 / 6, 0.5), "middle": (0.5, 0.5), "right": (5 / 6, 0.5)},
    "column": {"top": (0.5, 1 / 6), "middle": (0.5, 0.5), "bottom": (0.5, 5 / 6)},
    "alone": {"middle": (0.5, 0.5)},
}
CELL = {"quarters": (1 / 2, 1 / 2), "row": (1 / 3, 1.0), "column": (1.0, 1 / 3), "alone": (0.8, 0.8)}


@dataclass(frozen=True)
class Item:
    """One thing in a picture. x, y: centre and r: radius, all in pixels of the picture."""

    kind: str
    colour: str
    place: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; items are in reading order. shade: seeds the small colour jitter."""

    width: int
    height: int
    layout: str
    background: tuple[int, int, int]
    items: tuple[Item, ...]
    shade: int

    @property
    def places(self) -> tuple[str, ...]:
        """Every place of this layout, filled or not."""
        return tuple(LAYOUTS[self.layout])

    def with_kind(self, old: str, new: str) -> Scene:
        """The same picture with the one thing of kind `old` replaced: what makes a matched pair."""
        return replace(self, items=tuple(replace(i, kind=new) if i.kind == old else i for i in self.items))


def sample_size(rng: random.Random, *, odd: bool | None = None) -> tuple[int, int]:
    """(width, height). About 2 in 5 are square; `odd=True` asks for a ratio off 1:1, 2:1 and 3:1."""
    short = 56 if rng.random() < 0.3 else round(56 * 4 ** rng.random())
    odd = rng.random() < 0.4 if odd is None else odd
    if odd:  # the gap between 1.6 and 1.9 keeps "four places" and "three places" apart
        ratio = rng.uniform(1.08, 1.6) if rng.random() < 0.5 else rng.uniform(1.9, 3.2)
    else:
        ratio = rng.choice((1, 1, 1, 1, 2, 3))
    long = round(short * ratio)
    return (long, short) if rng.random() < 0.5 else (short, long)


def sample_scene(
    rng: random.Random,
    things: Sequence[tuple[str, str]],
    *,
    size: tuple[int, int] | None = None,
    alone: float = 0.3,
) -> Scene:
    """Place `things` ((colour, kind), at most 3) at random; `alone`: how often a single thing is centred and large."""
    width, height = size or sample_size(rng)
    ratio = width / height
    layout = "row" if ratio > 1.75 else "column" if ratio < 1 / 1.75 else "quarters"
    if len(things) == 1 and rng.random() < alone:
        layout = "alone"
    cell_w, cell_h = CELL[layout][0] * width, CELL[layout][1] * height
    centres = LAYOUTS[layout]
    items = []
    for place, (colour, kind) in zip(rng.sample(list(centres), len(things)), things, strict=True):
        x, y = centres[place][0] * width, centres[place][1] * height
        r = min(cell_w, cell_h) * (rng.uniform(0.34, 0.39) if kind not in SHAPES else rng.uniform(0.31, 0.40))
        items.append(
            Item(kind, colour, place, x + rng.uniform(-0.06, 0.06) * cell_w, y + rng.uniform(-0.06, 0.06) * cell_h, r)
        )
    items.sort(key=lambda i: list(centres).index(i.place))
    level = rng.randint(0, 50) if rng.random() < 0.5 else rng.randint(200, 247)
    background = (level + rng.randint(0, 8), level + rng.randint(0, 8), level + rng.randint(0, 8))
    return Scene(width, height, layout, background, tuple(items), rng.randrange(2**30))


def sample_shapes(
    rng: random.Random, count: int, combos: Sequence[tuple[str, str]] = TRAIN_COMBOS
) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs; mostly no colour and no shape twice, so that one word names a thing."""
    while True:
        things = rng.sample(combos, count)
        if rng.random() < 0.25 or (len({c for c, _ in things}) == len({s for _, s in things}) == count):
            return things


# ---------------------------------------------------------------- drawing


def _ngon(x: float, y: float, r: float, corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, first one up; with `inner`, of a star whose inner corners lie at inner * r."""
    steps = corners * 2 if inner else corners
    radius = [r if not inner or i % 2 == 0 else r * inner for i in range(steps)]
    turn = 2 * math.pi / steps
    return [(x + radius[i] * math.sin(turn * i), y - radius[i] * math.cos(turn * i)) for i in range(steps)]


def _draw_shape(d: ImageDraw.ImageDraw, kind: str, fill: Colour, x: float, y: float, r: float) -> None:
    if kind == "circle":
        d.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "square":
        d.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
    elif kind == "triangle":
        d.polygon(_ngon(x, y + 0.15 * r, 1.15 * r, 3), fill=fill)
    elif kind == "diamond":
        d.polygon([(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)], fill=fill)
    elif kind == "cross":
        d.rectangle([x - r, y - 0.33 * r, x + r, y + 0.33 * r], fill=fill)
        d.rectangle([x - 0.33 * r, y - r, x + 0.33 * r, y + r], fill=fill)
    else:
        d.polygon(_ngon(x, y, 1.15 * r, 5, inner=0.42), fill=fill)


def _draw_object(d: ImageDraw.ImageDraw, kind: str, fill: Colour, back: Colour, x: float, y: float, r: float) -> None:
    """Silhouettes as boxes (left, top, right, bottom), ellipses and polygons in units of r around the centre."""
    w = max(2, round(0.26 * r))

    def box(*b: float) -> None:
        d.rectangle([x + b[0] * r, y + b[1] * r, x + b[2] * r, y + b[3] * r], fill=fill)

    def oval(*b: float, **how: Any) -> None:
        d.ellipse([x + b[0] * r, y + b[1] * r, x + b[2] * r, y + b[3] * r], **(how or {"fill": fill}))

    def poly(*p: tuple[float, float]) -> None:
        d.polygon([(x + a * r, y + b * r) for a, b in p], fill=fill)

    if kind == "key":
        oval(-1, -0.5, 0, 0.5, outline=fill, width=w)
        box(-0.1, -0.15, 1, 0.15)
        box(0.65, 0, 1, 0.55)
    elif kind == "bottle":
        box(-0.5, -0.2, 0.5, 1)
        box(-0.2, -1, 0.2, 0)
    elif kind == "blade":
        poly((0, -1.1), (0.3, 0.3), (-0.3, 0.3))
        box(-0.7, 0.3, 0.7, 0.5)
        box(-0.15, 0.5, 0.15, 1)
    elif kind == "rope":
        oval(-1, -1, 1, 1, outline=fill, width=w)
        oval(-0.45, -0.45, 0.45, 0.45, outline=fill, width=w)
    elif kind == "torch":
        poly((0, -1.1), (0.55, -0.4), (0, 0), (-0.55, -0.4))
        poly((-0.4, 0.1), (0.4, 0.1), (0.12, 1), (-0.12, 1))
    elif kind == "mask":
        oval(-1, -0.65, 1, 0.65)
        oval(-0.65, -0.3, -0.15, 0.2, fill=back)
        oval(0.15, -0.3, 0.65, 0.2, fill=back)
    elif kind == "cup":
        box(-0.8, -0.5, 0.4, 0.8)
        oval(0.1, -0.3, 1, 0.6, outline=fill, width=w)
    elif kind == "lamp":
        poly((-0.4, -1), (0.4, -1), (1, 0.2), (-1, 0.2))
        box(-0.15, 0, 0.15, 1)
    elif kind == "book":
        box(-1, -0.6, -0.1, 0.6)
        box(0.1, -0.6, 1, 0.6)
    elif kind == "hat":
        box(-0.5, -0.7, 0.5, 0.4)
        box(-1, 0.4, 1, 0.65)
    elif kind == "flag":
        box(-0.8, -1, -0.6, 1)
        poly((-0.6, -1), (0.9, -0.5), (-0.6, 0))
    else:
        d.pieslice([x - 0.75 * r, y - 0.9 * r, x + 0.75 * r, y + 1.3 * r], 180, 360, fill=fill)
        box(-1, 0.25, 1, 0.5)
        oval(-0.22, 0.55, 0.22, 1)


def _draw_sign(d: ImageDraw.ImageDraw, kind: str, fill: Colour, x: float, y: float, r: float) -> None:
    frame, mark = SIGNS[kind]
    w = max(2, round(0.2 * r))
    if frame == "ring":
        d.ellipse([x - 1.1 * r, y - 1.1 * r, x + 1.1 * r, y + 1.1 * r], outline=fill, width=w)
    elif frame == "box":
        d.rectangle([x - r, y - r, x + r, y + r], outline=fill, width=w)
    else:
        corners = _ngon(x, y, 1.25 * r, 4)
        d.line([*corners, *corners[:2]], fill=fill, width=w, joint="curve")
    t = 0.52 * r
    bold = max(2, round(0.28 * r))
    if mark == "x":
        d.line([x - t, y - t, x + t, y + t], fill=fill, width=bold)
        d.line([x - t, y + t, x + t, y - t], fill=fill, width=bold)
    elif mark == "plus":
        d.line([x - 1.15 * t, y, x + 1.15 * t, y], fill=fill, width=bold)
        d.line([x, y - 1.15 * t, x, y + 1.15 * t], fill=fill, width=bold)
    elif mark == "bolt":
        zigzag = ((0.35, -1.3), (-0.7, 0.2), (-0.05, 0.2), (-0.35, 1.3), (0.7, -0.25), (0.05, -0.25))
        d.polygon([(x + a * t, y + b * t) for a, b in zigzag], fill=fill)
    else:
        d.ellipse([x - 0.7 * t, y - 0.7 * t, x + 0.7 * t, y + 0.7 * t], fill=fill)


def render(scene: Scene) -> Image.Image:
    """Draw the picture (RGB). Small pictures are drawn at twice their size and averaged down."""
    rng = random.Random(scene.shade)
    zoom = 2 if min(scene.width, scene.height) < 160 else 1
    image = Image.new("RGB", (scene.width * zoom, scene.height * zoom), scene.background)
    d = ImageDraw.Draw(image)
    for item in scene.items:
        red, green, blue = (max(0, min(255, v + rng.randint(-18, 18))) for v in COLOURS[item.colour])
        fill = (red, green, blue)
        x, y, r = item.x * zoom, item.y * zoom, item.r * zoom
        if item.kind in SIGNS:
            _draw_sign(d, item.kind, fill, x, y, r)
        elif item.kind in SHAPES:
            _draw_shape(d, item.kind, fill, x, y, r)
        else:
            _draw_object(d, item.kind, fill, scene.background, x, y, r)
    return image.resize((scene.width, scene.height), Image.Resampling.BILINEAR) if zoom > 1 else image


def patch_labels(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What lies at picture coordinates x, y (pixels, any shape): (..., 2), (kind + 1, colour + 1), 0 = nothing."""
    labels = np.zeros((*x.shape, 2), np.int64)
    for item in scene.items:
        inside = np.maximum(np.abs(x - item.x), np.abs(y - item.y)) < 1.15 * item.r
        labels[inside] = KINDS.index(item.kind) + 1, list(COLOURS).index(item.colour) + 1
    return labels
