"""The miniature MME: each image is asked about twice, once with either answer."""

from __future__ import annotations

from collections.abc import Callable

from kdscale.mini.benchmark_scenes import Row, Studio
from kdscale.mini.captions import with_article
from kdscale.mini.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    RELATIONS,
    WORDS,
    Draws,
    Pairs,
    Scene,
    draw_kind,
)

Facts = tuple[str, str]
POLITE = " Please answer yes or no."


def _other(draws: Draws, known: tuple[str, ...], true: str) -> Facts:
    """A true word and a false one."""
    return true, draws.pick(tuple(word for word in known if word != true))


def _thing(same: str) -> Callable[[Scene, Draws, Pairs], Facts]:
    """Names a thing of the scene, and one that is not there but shares `same` with it."""

    def facts(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
        """Draws the two names."""
        shown = {(thing.colour, thing.shape) for thing in scene.things}
        thing = draws.pick(scene.things)
        alike = tuple(
            (colour, shape)
            for colour, shape in pairs
            if (colour, shape) not in shown
            and (colour == thing.colour) is (same == "colour")
            and (shape == thing.shape) is (same == "shape")
        )
        return with_article(thing.name), with_article(" ".join(draws.pick(alike)))

    return facts


def _number(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
    return _other(draws, tuple(NUMBERS.values()), NUMBERS[len(scene.things)])


def _position(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
    first, second = (thing.name for thing in scene.things)
    relation = scene.relation or ""
    return (
        f"{first} {relation} the {second}",
        f"{first} {RELATIONS[relation][0]} the {second}",
    )


def _word(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
    return _other(draws, WORDS, scene.word or "")


def _background(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
    return _other(draws, tuple(BACKGROUNDS), scene.background)


def _tallest(scene: Scene, draws: Draws, pairs: Pairs) -> Facts:
    return _other(draws, tuple(COLOURS), scene.facts()["tallest"])


# Category: kind of scene, question, and what is true and false of a scene.
PERCEPTION = {
    "existence": ("single", "Is there {} in the image?", _thing("nothing")),
    "count": ("count", "Are there {} objects in the image?", _number),
    "position": ("pair", "Is the {} in the image?", _position),
    "color": ("single", "Is there {} in the image?", _thing("shape")),
    "posters": ("sign", "Is there a sign that says {} in the image?", _word),
    "celebrity": ("pair", "Is there {} in the image?", _thing("nothing")),
    "scene": ("single", "Is the background of the image {}?", _background),
    "landmark": ("chart", "Is the tallest bar {}?", _tallest),
    "artwork": ("single", "Is there {} in the image?", _thing("colour")),
    "OCR": ("sign", 'Is the word in the image "{}"?', _word),
}
COGNITION = {
    "commonsense_reasoning": ("count", "Do {} people get one object each?", _number),
    "numerical_calculation": ("count", "Do the objects, none taken away, number {}?", _number),
    "text_translation": ("sign", "Does the sign mean {} to a reader of English?", _word),
    "code_reasoning": ("count", 'Does print(names[len(objects)]) show "{}"?', _number),
}


def mme(studio: Studio, n: int) -> list[Row]:
    """Rows of MME: the ten categories of perception in turn, then one image of each of cognition.

    Args:
        studio: Draws the scenes.
        n: Rows, even.
    """
    num_perception = n // 2 - len(COGNITION)
    names = list(PERCEPTION)
    order = [names[i % len(names)] for i in range(num_perception)] + list(COGNITION)
    rows: list[Row] = []
    for item, category in enumerate(order):
        kind, question, facts = (PERCEPTION | COGNITION)[category]
        draws = studio.draws(item)
        scene = draw_kind(draws, kind, studio.pairs)
        true, false = facts(scene, draws, studio.pairs)
        name = f"{category}/{item:04d}"
        answers = [("Yes", true), ("No", false)]
        if draws.fraction() < 0.5:
            answers.reverse()
        rows += [
            {
                "question_id": f"{name}.png",
                "image": studio.image(scene, name),
                "question": question.format(words) + POLITE,
                "answer": answer,
                "category": category,
            }
            for answer, words in answers
        ]
    return rows
