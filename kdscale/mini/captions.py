"""What can be said of a scene of the miniature world."""

from __future__ import annotations

from kdscale.core.config import MiniWorld
from kdscale.mini.scenes import NUMBERS, RELATIONS, Draws, Scene, draw


def captions(scene: Scene) -> list[str]:
    """Describes a scene in several ways, the plainest first; all of them are true."""
    if scene.kind == "single":
        return _single_captions(scene)
    if scene.kind == "pair":
        assert scene.relation is not None
        first, second = (with_article(thing.name) for thing in scene.things)
        inverse = RELATIONS[scene.relation][0]
        return [
            f"{first} {scene.relation} {second}",
            f"{second} {inverse} {first}",
            f"{first} and {second}",
        ]
    if scene.kind == "count":
        number, things = NUMBERS[len(scene.things)], plural(scene.things[0].name)
        return [f"{number} {things}", f"a drawing of {number} {things}."]
    if scene.kind == "sign":
        assert scene.panel is not None
        return [
            f"a sign that says {scene.word}",
            f"{with_article(scene.panel)} sign that says {scene.word}",
        ]
    facts = scene.facts()
    return [
        f"a bar chart with {NUMBERS[len(scene.bars)]} bars, the tallest is {facts['tallest']}",
        f"a chart of {NUMBERS[len(scene.bars)]} bars",
    ]


def _single_captions(scene: Scene) -> list[str]:
    """Sentences about the only object of a scene."""
    thing = scene.things[0]
    name, sized = with_article(thing.name), thing.name
    if thing.size != "medium":
        sized = f"{thing.size} {thing.name}"
    place = "in the centre" if thing.position == "centre" else f"at the {thing.position}"
    return [
        name,
        f"a photo of {name}.",
        f"a drawing of {with_article(sized)}.",
        f"{with_article(sized)} {place}",
        f"{name} on {with_article(scene.background)} background",
    ]


def with_article(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def plural(words: str) -> str:
    """The words in the plural."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


def caption(world: MiniWorld, index: int) -> tuple[str, int | None]:
    """Writes the caption that a world pairs with an image.

    Returns:
        The caption, and the index of the other training scene that it describes instead, or None
        where it is true.
    """
    draws = Draws(world.seed, world.split, index, "caption")
    if draws.fraction() >= world.caption_noise:
        return draws.pick(tuple(captions(draw(world, index)))), None
    other = draws.below(2**31)
    elsewhere = draw(world.replace(split="train"), other)
    return draws.pick(tuple(captions(elsewhere))), other
