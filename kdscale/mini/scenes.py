"""Scenes of the miniature world: a pure function of (world seed, split, index) draws them.

A scene is one or two coloured shapes, a few equal ones, a sign with a short word, or a bar
chart. Forty of the hundred (colour, shape) compositions never occur in the `train` split, while
each colour and each shape occurs there with six partners; the `eval` split shows one object of a
held-out composition, which is also its class.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kdscale.core.config import MiniWorld

T = TypeVar("T")
Pairs = tuple[tuple[str, str], ...]
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 138, 24),
    "yellow": (246, 222, 44),
    "green": (46, 150, 60),
    "cyan": (38, 200, 208),
    "blue": (36, 72, 200),
    "purple": (124, 48, 164),
    "pink": (248, 128, 184),
    "brown": (122, 76, 40),
    "black": (24, 24, 28),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "grey": (176, 178, 180),
    "beige": (226, 212, 184),
    "mint": (200, 228, 208),
    "lavender": (212, 206, 234),
}
WORDS = (
    "CAT", "DOG", "SUN", "CAR", "BUS", "TEA", "MAP", "KEY",
    "HAT", "CUP", "BOX", "FOX", "JAM", "OWL", "PEN", "ZOO",
)  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = {
    "left of": ("right of", -1, 0),
    "right of": ("left of", 1, 0),
    "above": ("below", 0, -1),
    "below": ("above", 0, 1),
}
KINDS = {"single": 0.60, "pair": 0.20, "count": 0.08, "sign": 0.06, "chart": 0.06}
PARTNER_STEPS = (0, 3, 4, 7)
TEMPLATES = (
    "a {}.",
    "a photo of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "a large {}.",
    "a small {}.",
)


def _regular(num_corners: int, inner: float = 1.0, turn: float = -0.5) -> list[tuple[float, float]]:
    """Corners on the unit circle; with `inner` < 1 every second one is drawn in (a star)."""
    radii = (1.0, inner)
    return [
        (
            radii[i % 2] * math.cos(math.pi * (turn + 2 * i / num_corners)),
            radii[i % 2] * math.sin(math.pi * (turn + 2 * i / num_corners)),
        )
        for i in range(num_corners)
    ]


def _moon() -> list[tuple[float, float]]:
    """A crescent, open to the right."""
    outer = [math.pi * (0.28 + 1.44 * i / 20) for i in range(21)]
    rim = [(math.cos(a), math.sin(a)) for a in outer]
    inner = [(0.46 + 0.79 * math.cos(a), 0.79 * math.sin(a)) for a in outer]
    return rim + inner[::-1]


def _heart() -> list[tuple[float, float]]:
    """The sixteen-sin-cubed heart, point downwards."""
    points = []
    for i in range(28):
        t = 2 * math.pi * i / 28
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 15))
    return points


CROSS = [
    (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
    (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
]  # fmt: skip
ARROW = [(-1, -0.3), (0.05, -0.3), (0.05, -0.85), (1, 0), (0.05, 0.85), (0.05, 0.3), (-1, 0.3)]
OUTLINES: dict[str, list[np.ndarray]] = {
    name: [np.array(contour, dtype=np.float64) for contour in contours]
    for name, contours in {
        "circle": [_regular(32)],
        "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
        "triangle": [[(0, -0.95), (1, 0.8), (-1, 0.8)]],
        "star": [_regular(10, inner=0.42)],
        "heart": [_heart()],
        "cross": [CROSS],
        "diamond": [[(0, -1.05), (0.62, 0), (0, 1.05), (-0.62, 0)]],
        "ring": [_regular(32), [(0.55 * x, 0.55 * y) for x, y in _regular(32)]],
        "arrow": [ARROW],
        "moon": [_moon()],
    }.items()
}
SHAPES = tuple(OUTLINES)
_colours = tuple(COLOURS)
HELD_OUT: Pairs = tuple(
    (_colours[(row + step) % len(_colours)], shape)
    for row, shape in enumerate(SHAPES)
    for step in PARTNER_STEPS
)
TRAIN_PAIRS = tuple((c, s) for s in SHAPES for c in COLOURS if (c, s) not in HELD_OUT)
CLASSNAMES = tuple(f"{colour} {shape}" for colour, shape in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One shape. Position and radius are fractions of the image side, the angle is in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Colour and shape in words."""
        return f"{self.colour} {self.shape}"

    @property
    def size(self) -> str:
        """Large, small, or nothing in between."""
        return "large" if self.radius > 0.37 else "small" if self.radius < 0.31 else "medium"

    @property
    def position(self) -> str:
        """The side of the image that the centre lies nearest to."""
        dx, dy = self.x - 0.5, self.y - 0.5
        if max(abs(dx), abs(dy)) < 0.04:
            return "centre"
        if abs(dx) >= abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn, and what can be said of it.

    Attributes:
        kind: `single`, `pair`, `count`, `sign` or `chart`.
        relation: How the first thing lies to the second, for pairs.
        word: Text of a sign, whose panel has `panel`'s colour.
        bars: Colour and height (fraction of the side) of each bar, from the left.
        label: Index into `CLASSNAMES`, for the `eval` split.
        texture: Key of the background's noise.
        noise: Amplitude of the pixel noise, in grey levels.
    """

    kind: str
    background: str
    texture: int
    noise: int
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    word: str | None = None
    panel: str | None = None
    bars: tuple[tuple[str, float], ...] = field(default=())
    label: int | None = None

    def facts(self) -> dict[str, Any]:
        """Returns a JSON-able record of all that is true of the scene."""
        heights = [height for _, height in self.bars]
        return {
            "kind": self.kind,
            "background": self.background,
            "objects": [_thing_facts(thing) for thing in self.things],
            "count": len(self.things),
            "relation": self.relation,
            "text": self.word,
            "panel": self.panel,
            "bars": [{"colour": colour, "height": round(h, 4)} for colour, h in self.bars],
            "tallest": self.bars[heights.index(max(heights))][0] if heights else None,
        }


def _thing_facts(thing: Thing) -> dict[str, Any]:
    """The record of one object; the box is (left, top, right, bottom) in fractions."""
    edges = (-thing.radius, -thing.radius, thing.radius, thing.radius)
    centre = (thing.x, thing.y, thing.x, thing.y)
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size,
        "position": thing.position,
        "box": [round(c + e, 4) for c, e in zip(centre, edges, strict=True)],
    }


class Draws:
    """Random choices from one Philox stream, whose raw output no numpy release changes."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._raw: list[int] = []

    def fraction(self) -> float:
        """Returns a float in [0, 1)."""
        if not self._raw:
            self._raw = self._bits.random_raw(32).tolist()
        return (self._raw.pop() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """Returns a float in [low, high)."""
        return low + (high - low) * self.fraction()

    def below(self, bound: int) -> int:
        """Returns an integer in [0, bound)."""
        return int(self.fraction() * bound)

    def pick(self, options: tuple[T, ...]) -> T:
        """Returns one of the options."""
        return options[self.below(len(options))]

    def octets(self, count: int) -> np.ndarray:
        """Returns random bytes, apart from the stream of fractions only in order of use."""
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def draw(world: MiniWorld, index: int) -> Scene:
    """Draws what scene `index` of a world shows.

    Args:
        world: Only `seed` and `split` matter here.
        index: Any non-negative integer, also beyond `num_samples`.
    """
    draws = Draws(world.seed, world.split, index)
    base = _backdrop(draws)
    if world.split == "eval":
        label = index % len(HELD_OUT)
        return Scene("single", things=(_single(draws, HELD_OUT[label]),), label=label, **base)
    share = draws.fraction()
    for kind, weight in KINDS.items():  # noqa: B007 - used after the loop
        share -= weight
        if share < 0:
            break
    return _DRAWERS[kind](draws, base, TRAIN_PAIRS)


def draw_kind(draws: Draws, kind: str, pairs: Pairs) -> Scene:
    """Draws a scene of one of `KINDS`, whose things have compositions out of `pairs`."""
    return _DRAWERS[kind](draws, _backdrop(draws), pairs)


def _backdrop(draws: Draws) -> dict[str, Any]:
    """What every scene has: a background, its texture and the noise."""
    background, texture = draws.pick(tuple(BACKGROUNDS)), draws.below(2**48)
    return {"background": background, "texture": texture, "noise": 8 + draws.below(25)}


def _single(draws: Draws, pair: tuple[str, str]) -> Thing:
    """One thing, wholly inside the image and not too far from its centre."""
    radius = draws.between(0.26, 0.43)
    room = 0.6 * (0.48 - radius)
    x, y = 0.5 + draws.between(-room, room), 0.5 + draws.between(-room, room)
    return _thing(draws, pair, (x, y), radius)


def _thing(
    draws: Draws, pair: tuple[str, str], centre: tuple[float, float], radius: float
) -> Thing:
    """A thing with its own shade and a slight turn."""
    colour, shape = pair
    red, green, blue = (min(255, max(0, base + draws.below(37) - 18)) for base in COLOURS[colour])
    return Thing(
        shape, colour, centre[0], centre[1], radius, draws.between(-0.2, 0.2), (red, green, blue)
    )


def _single_scene(draws: Draws, base: dict[str, Any], pairs: Pairs) -> Scene:
    return Scene("single", things=(_single(draws, draws.pick(pairs)),), **base)


def _pair_scene(draws: Draws, base: dict[str, Any], pairs: Pairs) -> Scene:
    first, second = draws.pick(pairs), draws.pick(pairs)
    if first == second:
        second = pairs[(pairs.index(first) + 7) % len(pairs)]
    relation = draws.pick(tuple(RELATIONS))
    _, dx, dy = RELATIONS[relation]
    things = []
    for pair, side in ((first, 1), (second, -1)):
        radius = draws.between(0.16, 0.23)
        x = 0.5 + side * dx * 0.25 + (0.0 if dx else draws.between(-0.2, 0.2))
        y = 0.5 + side * dy * 0.25 + (0.0 if dy else draws.between(-0.2, 0.2))
        things.append(_thing(draws, pair, (x, y), radius))
    return Scene("pair", things=tuple(things), relation=relation, **base)


def _count_scene(draws: Draws, base: dict[str, Any], pairs: Pairs) -> Scene:
    pair, number, skip = draws.pick(pairs), 2 + draws.below(4), draws.below(9)
    cells = [(skip + 4 * i) % 9 for i in range(number)]
    centres = [
        (
            (1 + 2 * (cell % 3)) / 6 + draws.between(-0.02, 0.02),
            (1 + 2 * (cell // 3)) / 6 + draws.between(-0.02, 0.02),
        )
        for cell in cells
    ]
    radius = draws.between(0.11, 0.14)
    things = tuple(_thing(draws, pair, centre, radius) for centre in centres)
    return Scene("count", things=things, **base)


def _sign_scene(draws: Draws, base: dict[str, Any], _pairs: Pairs) -> Scene:
    return Scene("sign", word=draws.pick(WORDS), panel=draws.pick(tuple(COLOURS)), **base)


def _chart_scene(draws: Draws, base: dict[str, Any], _pairs: Pairs) -> Scene:
    names = list(COLOURS)
    colours = [names.pop(draws.below(len(names))) for _ in range(3 + draws.below(3))]
    tallest = draws.below(len(colours))
    bars = [
        (colour, 0.85 if i == tallest else draws.between(0.2, 0.68))
        for i, colour in enumerate(colours)
    ]
    return Scene("chart", bars=tuple(bars), **base)


_DRAWERS = {
    "single": _single_scene,
    "pair": _pair_scene,
    "count": _count_scene,
    "sign": _sign_scene,
    "chart": _chart_scene,
}
