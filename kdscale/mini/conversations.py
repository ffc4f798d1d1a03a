"""Conversations of the miniature world, in LLaVA's form.

A `pretrain` world asks for the caption of each of its image-text pairs. An `instruct` world draws
scenes of its own, with more pairs and charts than captions have, and asks up to three questions
about each; a tenth of its conversations are about no image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdscale.core.config import MiniWorld
from kdscale.mini.captions import caption
from kdscale.mini.questions import SHORT, ask, askable, pairs_of
from kdscale.mini.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    WORDS,
    Draws,
    Scene,
    T,
    draw,
    draw_kind,
)

IMAGE = "<image>"
INSTRUCT_KINDS = {"single": 0.5, "pair": 0.29, "count": 0.07, "sign": 0.07, "chart": 0.07}
# The hardest families to learn: they need colour and shape, or two objects, at once.
MORE_OFTEN = {"single": ("existence", "existence"), "pair": ("relation",)}
TEXT_SHARE = 0.1
IMAGE_LAST = 0.1
MAX_ROUNDS = 3
REQUESTS = (
    "Write a caption for this image.",
    "What does this image show?",
    "Describe the picture in a few words.",
    "Say what you see.",
    "Give a brief description of the picture.",
    "Sum up what is in the image.",
)
Rounds = list[tuple[str, str]]


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        scene: What the image shows, None where there is none.
        turns: LLaVA's list of `{"from": "human" | "gpt", "value": text}`.
    """

    scene: Scene | None
    turns: list[dict[str, str]]

    @property
    def modality(self) -> str:
        """`image` or `text`."""
        return "text" if self.scene is None else "image"

    @property
    def num_words(self) -> int:
        """Words of all turns, as LLaVA counts them."""
        return sum(len(turn["value"].split()) for turn in self.turns)


def converse(world: MiniWorld, index: int) -> Conversation:
    """Holds the conversation of one sample.

    Args:
        world: Of content `pretrain` or `instruct`.
        index: The sample's place in the world.
    """
    if world.content == "instruct":
        return _instruct(world, index)
    draws = Draws(world.seed, world.split, index, "request")
    request, is_last = draws.pick(REQUESTS), draws.fraction() < 0.5
    rounds = [(_with_image(request, is_last), caption(world, index)[0])]
    return Conversation(draw(world, index), _turns(rounds))


def llava_record(talk: Conversation, key: str) -> dict[str, Any]:
    """Returns an entry of LLaVA's json; an image lies in a folder named by its shard."""
    image = {} if talk.scene is None else {"image": f"{key[:5]}/{key}.jpg"}
    return {"id": key, **image, "conversations": talk.turns}


def _instruct(world: MiniWorld, index: int) -> Conversation:
    """Several questions on a scene, or some on no image at all."""
    draws = Draws(world.seed, world.split, index, "instruct")
    if draws.fraction() < TEXT_SHARE:
        rounds = [_text_only(draws) for _ in range(1 + draws.below(MAX_ROUNDS))]
        return Conversation(None, _turns(rounds))
    pairs, is_last = pairs_of(world), draws.fraction() < IMAGE_LAST
    scene = draw_kind(draws, _weighted(draws, INSTRUCT_KINDS), pairs)
    families = askable(scene) + MORE_OFTEN.get(scene.kind, ())
    chosen = _shuffled(draws, families)[: 1 + draws.below(MAX_ROUNDS)]
    asked = [ask(family, scene, draws, pairs) for family in chosen]
    rounds = list({question.prompt: question.gold for question in asked}.items())
    rounds[0] = _with_image(rounds[0][0], is_last), rounds[0][1]
    return Conversation(scene, _turns(rounds))


def _text_only(draws: Draws) -> tuple[str, str]:
    """A question that needs no image."""
    kind = draws.below(4)
    if kind == 0:
        first, second = draws.below(5), draws.below(5)
        return f"What is {first} plus {second}?\n{SHORT}", str(first + second)
    if kind == 1:
        relation = draws.pick(tuple(RELATIONS))
        return f"What is the opposite of {relation}?\n{SHORT}", RELATIONS[relation][0]
    if kind == 2:
        is_colour = draws.fraction() < 0.5
        word = draws.pick(tuple(COLOURS) if is_colour else SHAPES)
        return f"Is {word} a colour or a shape?\n{SHORT}", "colour" if is_colour else "shape"
    word = draws.pick(WORDS)
    return f"Spell the word {word}.", " ".join(word)


def _with_image(text: str, is_last: bool) -> str:
    """The text with the place of the image before or after it."""
    return f"{text}\n{IMAGE}" if is_last else f"{IMAGE}\n{text}"


def _turns(rounds: Rounds) -> list[dict[str, str]]:
    """LLaVA's list of turns."""
    sides = ((("human", question), ("gpt", answer)) for question, answer in rounds)
    return [{"from": who, "value": value} for pair in sides for who, value in pair]


def _weighted(draws: Draws, weights: dict[str, float]) -> str:
    """One of the keys, by weight."""
    share = draws.fraction() * sum(weights.values())
    for name, weight in weights.items():
        share -= weight
        if share < 0:
            return name
    return next(reversed(weights))


def _shuffled(draws: Draws, items: tuple[T, ...]) -> list[T]:
    """The items in random order."""
    left = list(items)
    return [left.pop(draws.below(len(left))) for _ in items]
