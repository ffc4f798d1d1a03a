"""Miniature benchmarks of multiple choice: the rows of their original files."""

from __future__ import annotations

from dataclasses import replace

from kdscale.mini.benchmark_scenes import Choice, Row, Studio, shuffled, turns
from kdscale.mini.questions import LETTERS, PLACES
from kdscale.mini.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing

FAMILIES = ("choice", "colour", "counting", "relation")
MMBENCH_STEP = 1_000_000
NUM_VIDEOS = 2
CHOICES_FOLLOW = " Select from the following choices."


def mmbench(studio: Studio, n: int) -> list[Row]:
    """Rows of MMBench: first all questions, then their rotations."""
    num_questions = n // len(LETTERS)
    choices = [
        studio.choice(*turns(item, FAMILIES), studio.draws(item)) for item in range(num_questions)
    ]
    rows: list[Row] = []
    for rotation in range(len(LETTERS)):
        for item, choice in enumerate(choices):
            options = choice.options[-rotation:] + choice.options[:-rotation]
            rows.append(
                {
                    "index": item + rotation * MMBENCH_STEP,
                    "question": choice.text,
                    "hint": "Look at the image." if item % 8 == 7 else "nan",
                    "answer": LETTERS[(choice.place + rotation) % len(LETTERS)],
                    **dict(zip(LETTERS, options, strict=True)),
                    "category": choice.family,
                    "image": studio.image(choice.scene, str(item)),
                    "source": "mini",
                    "l2-category": "perception",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    return rows


def seedbench(studio: Studio, n: int) -> list[Row]:
    """Rows of SEED-Bench, and a few on videos, which nobody is asked."""
    rows: list[Row] = []
    for item in range(n + NUM_VIDEOS):
        is_video = item < NUM_VIDEOS
        family, turn = turns(max(0, item - NUM_VIDEOS), FAMILIES)
        choice = studio.choice(family, turn, studio.draws(item))
        image = studio.image(choice.scene, str(item))
        names = (f"choice_{letter.lower()}" for letter in LETTERS)
        rows.append(
            {
                "answer": choice.letter,
                **dict(zip(names, choice.options, strict=True)),
                "data_id": str(item),
                "data_type": "video" if is_video else "image",
                "question": choice.text,
                "question_id": str(item),
                "question_type_id": 10 if is_video else 1 + FAMILIES.index(family),
                "image": [image] * (3 if is_video else 1),
                "segment": [0, 1] if is_video else None,
            }
        )
    return rows


def scienceqa(studio: Studio, n: int) -> list[Row]:
    """Rows of ScienceQA; a quarter have no image and can be answered by who knows the words."""
    rows: list[Row] = []
    for item in range(n):
        draws, image = studio.draws(item), None
        if item % 4 == 3:
            place = draws.below(2)
            word = draws.pick((tuple(COLOURS), SHAPES)[place])
            text, options = f"Is {word} a colour or a shape?", ("colour", "shape")
        else:
            choice = studio.choice(*turns(item - item // 4, FAMILIES), draws)
            text, options, place = choice.text, choice.options, choice.place
            image = studio.image(choice.scene, "image")
        rows.append(
            {
                "image": image,
                "question": text,
                "choices": list(options),
                "answer": place,
                "hint": "Look at the image." if item % 8 == 4 else "",
                "task": "closed choice",
                "grade": f"grade{1 + item % 12}",
                "subject": "natural science",
                "topic": "figures",
                "category": "Figures",
                "skill": "Say what is shown",
                "lecture": "",
                "solution": "",
            }
        )
    return rows


def ai2d(studio: Studio, n: int) -> list[Row]:
    """Rows of AI2D."""
    rows: list[Row] = []
    for item in range(n):
        choice = studio.choice(*turns(item, ("choice", "chart")), studio.draws(item))
        rows.append(
            {
                "question": choice.text,
                "options": list(choice.options),
                "answer": str(choice.place),
                "image": studio.image(choice.scene, str(item)),
            }
        )
    return rows


def mmvp(studio: Studio, n: int) -> list[tuple[Row, bytes]]:
    """Lines of MMVP with their images: two images that differ in one thing, and one question."""
    lines: list[tuple[Row, bytes]] = []
    for pair in range(n // 2):
        question, first, second = (
            _two_colours(studio, pair) if pair % 2 else _two_places(studio, pair)
        )
        options = (first[1], second[1])
        scenes = [("(a)", first[0]), ("(b)", second[0])]
        if studio.draws(-1 - pair).fraction() < 0.5:
            scenes.reverse()
        for answer, scene in scenes:
            row = {
                "lndex": len(lines) + 1,
                "Question": question,
                "Options": f"(a) {options[0]} (b) {options[1]}",
                "Correct Answer": answer,
            }
            lines.append((row, studio.image(scene, "")["bytes"]))
    return lines


Told = tuple[Scene, str]


def _two_colours(studio: Studio, pair: int) -> tuple[str, Told, Told]:
    """One thing in two of its shape's colours."""
    draws = studio.draws(pair)
    scene = studio.scene("single", draws, lambda scene: True)
    thing = scene.things[0]
    colours = tuple(colour for colour, shape in studio.pairs if shape == thing.shape)
    first, second = shuffled(draws, colours)[:2]
    told = [
        (replace(scene, things=(replace(thing, colour=colour, rgb=COLOURS[colour]),)), colour)
        for colour in (first, second)
    ]
    return "What colour is the object?", told[0], told[1]


def _two_places(studio: Studio, pair: int) -> tuple[str, Told, Told]:
    """Two things that change places."""
    scene = studio.scene("pair", studio.draws(pair), lambda scene: True)
    first, second = scene.things
    relation = scene.relation or ""
    inverse = RELATIONS[relation][0]
    swapped = (
        replace(first, x=second.x, y=second.y),
        replace(second, x=first.x, y=first.y),
    )
    return (
        f"Where is the {first.name} relative to the {second.name}?",
        (scene, PLACES[relation]),
        (replace(scene, things=swapped, relation=inverse), PLACES[inverse]),
    )


def cvbench_2d(studio: Studio, n: int) -> list[Row]:
    """Rows of CV-Bench 2D: counting with four choices, and relations with two."""
    rows: list[Row] = []
    for item in range(n):
        draws, turn = studio.draws(item), item // 2
        source = ("ADE20K", "COCO")[turn % 2]
        if item % 2 == 0:
            choice = studio.choice("counting", turn, draws)
            rows.append(_cvbench_row(studio, item, choice, ("2D", "Count", source)))
            continue
        scene, text, gold = studio.asked("relation", turn // 2, draws)
        opposite = PLACES[RELATIONS[{v: k for k, v in PLACES.items()}[gold]][0]]
        options = (gold, opposite) if turn % 2 == 0 else (opposite, gold)
        choice = Choice("relation", scene, text, options, turn % 2)
        rows.append(_cvbench_row(studio, item, choice, ("2D", "Relation", source)))
    return rows


def cvbench_3d(studio: Studio, n: int) -> list[Row]:
    """Rows of CV-Bench 3D: the nearer of two things is drawn larger."""
    questions = {
        "Depth": "Which object is closer to the camera taking this photo, the {} or the {}?",
        "Distance": "Which object is further away from the camera, the {} or the {}?",
    }
    rows: list[Row] = []
    for item in range(n):
        task, turn = turns(item, tuple(questions))
        draws = studio.draws(item)
        scene = studio.scene("pair", draws, lambda scene: True)
        radii = (0.24, 0.13) if draws.fraction() < 0.5 else (0.13, 0.24)
        things = tuple(replace(t, radius=r) for t, r in zip(scene.things, radii, strict=True))
        near, far = sorted(things, key=lambda thing: -thing.radius)
        gold, other = (near, far) if task == "Depth" else (far, near)
        options = (gold.name, other.name) if turn % 2 == 0 else (other.name, gold.name)
        text = questions[task].format(*options)
        choice = Choice(task, replace(scene, things=things), text, options, turn % 2)
        rows.append(_cvbench_row(studio, item, choice, ("3D", task, "Omni3D")))
    return rows


def _cvbench_row(studio: Studio, item: int, choice: Choice, kinds: tuple[str, str, str]) -> Row:
    """One row of CV-Bench; kinds are type, task and source."""
    listed = [f"\n({a}) {text}" for a, text in zip(LETTERS, choice.options, strict=False)]
    return {
        "idx": item,
        "type": kinds[0],
        "task": kinds[1],
        "image": studio.image(choice.scene, f"{item:06d}"),
        "question": choice.text,
        "choices": list(choice.options),
        "answer": f"({choice.letter})",
        "prompt": choice.text + CHOICES_FOLLOW + "".join(listed),
        "filename": f"img/{kinds[0]}/{item:06d}.jpg",
        "source": kinds[2],
        "source_dataset": f"mini {kinds[2]}",
        "source_filename": f"{item:06d}.jpg",
        "target_class": None,
        "target_size": None,
        "bbox": [_box(thing) for thing in choice.scene.things],
    }


def _box(thing: Thing) -> list[float]:
    """Left, top, right and bottom in fractions of the side."""
    r = thing.radius
    return [round(v, 4) for v in (thing.x - r, thing.y - r, thing.x + r, thing.y + r)]
