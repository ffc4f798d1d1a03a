"""Scenes and questions for the miniature benchmarks; each benchmark has draws of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdscale.core.config import MiniWorld
from kdscale.mini.paint import encode_jpeg
from kdscale.mini.questions import ANSWERS, LETTERS, ask_for, pairs_of
from kdscale.mini.scenes import Draws, Pairs, Scene, draw_kind

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A question with options, one of which holds.

    Attributes:
        family: A key of `ANSWERS`.
        options: In order.
        place: Of the right one.
    """

    family: str
    scene: Scene
    text: str
    options: tuple[str, ...]
    place: int

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.place]


@dataclass(frozen=True)
class Studio:
    """Where one benchmark's items are drawn.

    Attributes:
        world: An `instruct` world of the `eval` split.
        benchmark: Its name; benchmarks share no scene.
    """

    world: MiniWorld
    benchmark: str

    @property
    def pairs(self) -> Pairs:
        """Compositions that scenes and questions may have."""
        return pairs_of(self.world)

    def draws(self, item: int) -> Draws:
        """Random choices for one item."""
        return Draws(self.world.seed, self.world.split, "benchmark", self.benchmark, item)

    def image(self, scene: Scene, name: str) -> Row:
        """An image as the hub's data sets store it."""
        return {"bytes": encode_jpeg(scene, self.world.image_px), "path": f"{name}.jpg"}

    def scene(self, kind: str, draws: Draws, holds: Callable[[Scene], bool]) -> Scene:
        """Draws scenes of a kind until a condition holds."""
        scene = draw_kind(draws, kind, self.pairs)
        while not holds(scene):
            scene = draw_kind(draws, kind, self.pairs)
        return scene

    def asked(self, family: str, turn: int, draws: Draws) -> tuple[Scene, str, str]:
        """A scene, a question and its answer; the family's answers take turns."""
        wanted = ANSWERS[family][turn % len(ANSWERS[family])]
        scene, question = ask_for(family, wanted, draws, self.pairs)
        return scene, question.text, question.gold

    def choice(self, family: str, turn: int, draws: Draws) -> Choice:
        """A question with four options; both the right letter and the right text take turns."""
        # Where all answers have had their turn, the letters move on by one.
        place = (turn + turn // len(ANSWERS[family])) % len(LETTERS)
        if family == "choice":
            scene, question = ask_for(family, LETTERS[place], draws, self.pairs)
            return Choice(family, scene, question.text, question.options, place)
        scene, text, gold = self.asked(family, turn, draws)
        others = [answer for answer in ANSWERS[family] if answer != gold]
        options = [others.pop(draws.below(len(others))) for _ in LETTERS[1:]]
        options.insert(place, gold)
        return Choice(family, scene, text, tuple(options), place)


def turns(index: int, families: tuple[str, ...]) -> tuple[str, int]:
    """The family of an item, and how often that had its turn before."""
    turn, place = divmod(index, len(families))
    return families[place], turn


def shuffled(draws: Draws, items: tuple[str, ...]) -> list[str]:
    """The items in random order."""
    left = list(items)
    return [left.pop(draws.below(len(left))) for _ in items]
