"""Questions about scenes of the miniature world, with answers that cannot be guessed.

Within a family, every answer is equally likely whatever the question's text says, in training as
in evaluation: who does not see the image is at `CHANCE`. Prompts end as LLaVA's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kdscale.core.config import MiniWorld
from kdscale.core.types import ConfigError
from kdscale.mini.captions import captions, plural, with_article
from kdscale.mini.paint import encode_jpeg
from kdscale.mini.scenes import (
    COLOURS,
    HELD_OUT,
    NUMBERS,
    RELATIONS,
    TRAIN_PAIRS,
    WORDS,
    Draws,
    Pairs,
    Scene,
    draw_kind,
)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = ("A", "B", "C", "D")
PLACES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
ANSWERS: dict[str, tuple[str, ...]] = {
    "existence": ("Yes", "No"),
    "counting": tuple(map(str, NUMBERS)),
    "colour": tuple(COLOURS),
    "relation": tuple(PLACES.values()),
    "choice": LETTERS,
    "text": WORDS,
    "chart": tuple(COLOURS),
}
FAMILIES = tuple(ANSWERS)
CHANCE = {family: 1 / len(answers) for family, answers in ANSWERS.items()}
EVAL_KINDS = {
    "existence": "single",
    "counting": "count",
    "colour": "single",
    "relation": "pair",
    "choice": "single",
    "text": "sign",
    "chart": "chart",
}
ABOUT_ONE_SCENE = ("existence", "choice")  # any answer can be had of any scene
DESCRIBE = (
    "Describe the image briefly.",
    "What is shown in the image?",
    "Give a short caption for this picture.",
    "Say in one sentence what you see.",
)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        family: A key of `ANSWERS`, or `caption`.
        text: The question alone.
        gold: The answer.
        options: What the letters stand for, in multiple choice.
    """

    family: str
    text: str
    gold: str
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The question with its options and the form of the answer."""
        if self.family == "caption":
            return self.text
        listed = [f"{letter}. {o}" for letter, o in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.text, *listed, LETTER if listed else SHORT])


def ask(family: str, scene: Scene, draws: Draws, pairs: Pairs) -> Question:
    """Asks about a scene.

    Args:
        family: One of `askable(scene)`.
        scene: What the image shows.
        draws: Chooses among the possible questions.
        pairs: Compositions that a question may name.

    Returns:
        A question whose answer holds for the scene.
    """
    text, gold, options = _ASKERS[family](scene, draws, pairs)
    return Question(family, text, gold, options)


def askable(scene: Scene) -> tuple[str, ...]:
    """Returns the families that fit a scene, captions among them."""
    return {
        "single": ("existence", "colour", "choice", "caption"),
        "pair": ("relation", "existence", "colour", "caption"),
        "count": ("counting", "existence", "colour", "caption"),
        "sign": ("text", "caption"),
        "chart": ("chart", "caption"),
    }[scene.kind]


def pairs_of(world: MiniWorld) -> Pairs:
    """Returns the compositions that a world's scenes and questions are made of."""
    return HELD_OUT if world.split == "eval" else TRAIN_PAIRS


Asked = tuple[str, str, tuple[str, ...]]


def _existence(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    """Yes or no with even odds; half the wrong names share the colour or the shape."""
    shown = {(thing.colour, thing.shape) for thing in scene.things}
    colour, shape = _any_thing(scene, draws)
    is_there, likeness = draws.fraction() < 0.5, min(2, draws.below(4))
    if not is_there:
        alike = (
            lambda pair: pair[0] == colour,
            lambda pair: pair[1] == shape,
            lambda pair: pair[0] != colour and pair[1] != shape,
        )[likeness]
        colour, shape = draws.pick(tuple(p for p in pairs if p not in shown and alike(p)))
    text = f"Is there {with_article(f'{colour} {shape}')} in the image?"
    return text, "Yes" if is_there else "No", ()


def _counting(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    things = plural(scene.things[0].name) if draws.fraction() < 0.5 else "objects"
    return f"How many {things} are in the image?", str(len(scene.things)), ()


def _colour(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    """Never names the shape, whose partners would tell what the colour cannot be."""
    if scene.kind == "count":
        return "What colour are the objects?", scene.things[0].colour, ()
    if scene.relation is None:
        return "What colour is the object?", scene.things[0].colour, ()
    which = draws.below(2)
    relation = scene.relation if which == 0 else RELATIONS[scene.relation][0]
    where = {
        "left of": "on the left",
        "right of": "on the right",
        "above": "at the top",
        "below": "at the bottom",
    }[relation]
    return f"What colour is the object {where}?", scene.things[which].colour, ()


def _relation(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    assert scene.relation is not None
    first, second = (thing.name for thing in scene.things)
    relation = scene.relation
    if draws.fraction() < 0.5:
        first, second, relation = second, first, RELATIONS[relation][0]
    return f"Where is the {first} relative to the {second}?", PLACES[relation], ()


def _choice(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    colour, shape = _any_thing(scene, draws)
    names = [name for pair in pairs if (name := " ".join(pair)) != f"{colour} {shape}"]
    options = [names.pop(draws.below(len(names))) for _ in LETTERS]
    place = draws.below(len(LETTERS))
    options[place] = f"{colour} {shape}"
    return "What is in the image?", LETTERS[place], tuple(options)


def _text(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    assert scene.word is not None
    return draws.pick(("What does the sign say?", "Which word is on the sign?")), scene.word, ()


def _chart(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    return "What colour is the tallest bar?", scene.facts()["tallest"], ()


def _caption(scene: Scene, draws: Draws, pairs: Pairs) -> Asked:
    return draws.pick(DESCRIBE), draws.pick(tuple(captions(scene))), ()


def _any_thing(scene: Scene, draws: Draws) -> tuple[str, str]:
    """Colour and shape of a thing of the scene."""
    thing = draws.pick(scene.things)
    return thing.colour, thing.shape


_ASKERS: dict[str, Callable[[Scene, Draws, Pairs], Asked]] = {
    "existence": _existence,
    "counting": _counting,
    "colour": _colour,
    "relation": _relation,
    "choice": _choice,
    "text": _text,
    "chart": _chart,
    "caption": _caption,
}


def eval_item(world: MiniWorld, index: int) -> tuple[Scene, Question]:
    """Draws one item of the benchmark, whose things are held-out compositions.

    Families take turns, and within a family its answers, so that all are equally frequent. Each
    image of `existence` is asked twice, once with either answer.

    Args:
        world: An `instruct` world of the `eval` split.
        index: Any non-negative integer.

    Returns:
        The scene and the question.

    Raises:
        ConfigError: The world is another one.
    """
    if (world.split, world.content) != ("eval", "instruct"):
        raise ConfigError(
            f"questions are held out in a world of split 'eval' and content 'instruct', not of "
            f"{world.split!r} and {world.content!r}"
        )
    family, turn = FAMILIES[index % len(FAMILIES)], index // len(FAMILIES)
    wanted = ANSWERS[family][turn % len(ANSWERS[family])]
    draws = Draws(world.seed, world.split, group_of(index), "question")
    return ask_for(family, wanted, draws, pairs_of(world))


def ask_for(family: str, wanted: str, draws: Draws, pairs: Pairs) -> tuple[Scene, Question]:
    """Draws a scene and a question about it until the answer is the wanted one.

    Args:
        family: A key of `ANSWERS`.
        wanted: One of the family's answers.
        draws: Where scenes and questions come from.
        pairs: Compositions that they may name.
    """
    scene = draw_kind(draws, EVAL_KINDS[family], pairs)
    question = ask(family, scene, draws, pairs)
    while question.gold != wanted:
        if family not in ABOUT_ONE_SCENE:
            scene = draw_kind(draws, EVAL_KINDS[family], pairs)
        question = ask(family, scene, draws, pairs)
    return scene, question


def group_of(index: int) -> str:
    """Names the image of an item; items of one group are not independent."""
    family, turn = FAMILIES[index % len(FAMILIES)], index // len(FAMILIES)
    return f"{family}-{turn // 2 if family == 'existence' else turn:05d}"


def eval_items(world: MiniWorld) -> Iterator[dict[str, Any]]:
    """Yields the benchmark of a world, `num_samples` items.

    Args:
        world: An `instruct` world of the `eval` split.

    Yields:
        `item_id`, `family`, `question`, `options` (a list, empty but in multiple choice),
        `prompt` (question, options and the form of the answer), `gold`, `chance`, `group` (items
        on the same image) and `image` (JPEG bytes).

    Raises:
        ConfigError: The world is another one.
    """
    for index in range(world.num_samples):
        scene, question = eval_item(world, index)
        yield {
            "item_id": f"{question.family}-{index // len(FAMILIES):05d}",
            "family": question.family,
            "question": question.text,
            "options": list(question.options),
            "prompt": question.prompt,
            "gold": question.gold,
            "chance": CHANCE[question.family],
            "group": group_of(index),
            "image": encode_jpeg(scene, world.image_px),
        }
