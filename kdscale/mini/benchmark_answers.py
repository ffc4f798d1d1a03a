"""Miniature benchmarks with open answers: the rows of their original files.

Questions are worded as the miniature VLM's training asks them where the original's form allows it.
"""

from __future__ import annotations

from kdscale.mini.benchmark_scenes import Row, Studio, shuffled, turns
from kdscale.mini.questions import ANSWERS, LETTERS, SHORT, ask
from kdscale.mini.scenes import COLOURS, WORDS, Draws, Scene

SIGN_COLOUR = "What colour is the sign?"
SIGN_WORD = "What does the sign say?"
OPEN = ("colour", "relation", "counting", "chart")
ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
INTEGER_HINT = (
    "Hint: Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.\nQuestion: "
)
LETTER_HINT = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, "
    "at the end.\nQuestion: "
)


def gqa(studio: Studio, n: int) -> tuple[list[Row], list[Row]]:
    """Rows of GQA's two tables, instructions and images; each image is asked about twice."""
    rows: list[Row] = []
    images: list[Row] = []
    for item in range(n // 2):
        draws, name = studio.draws(item), f"n{item:06d}"
        family, turn = turns(item, ("colour", "relation"))
        scene, text, gold = studio.asked(family, turn, draws)
        # Alternates with the answer's turn, else the colour would tell.
        is_there = (turn + turn // len(ANSWERS[family])) % 2 == 0
        asked = [(text, gold, family), (*_is_there(studio, scene, draws, is_there), "exist")]
        images.append({"id": name, "image": studio.image(scene, name)})
        rows += [
            {
                "id": f"{len(rows) + place:08d}",
                "imageId": name,
                "question": question,
                "answer": answer,
                "fullAnswer": f"The answer is {answer}.",
                "isBalanced": True,
                "types": {
                    "structural": "verify" if kind == "exist" else "query",
                    "semantic": {"exist": "obj", "colour": "attr", "relation": "rel"}[kind],
                    "detailed": kind,
                },
            }
            for place, (question, answer, kind) in enumerate(asked)
        ]
    return rows, images


def _is_there(studio: Studio, scene: Scene, draws: Draws, is_there: bool) -> tuple[str, str]:
    """A question on the existence of a thing, with the answer that is wanted."""
    wanted = "Yes" if is_there else "No"
    question = ask("existence", scene, draws, studio.pairs)
    while question.gold != wanted:
        question = ask("existence", scene, draws, studio.pairs)
    return question.text, wanted.lower()


def mmmu(studio: Studio, n: int) -> list[Row]:
    """Rows of MMMU, in turn open and of multiple choice; images beyond the first are absent."""
    rows: list[Row] = []
    for item in range(n):
        draws, is_open = studio.draws(item), item % 2 == 0
        family, turn = turns(item // 2, OPEN)
        if is_open:
            scene, text, gold = studio.asked(family, turn, draws)
            options: list[str] = []
        else:
            choice = studio.choice(family, turn, draws)
            scene, text, gold = choice.scene, choice.text, choice.letter
            options = list(choice.options)
        name = f"validation_{family.capitalize()}_{item}"
        rows.append(
            {
                "id": name,
                "question": f"{text}<image 1>",
                "options": repr(options),
                "explanation": "",
                "image_1": studio.image(scene, f"{name}_1"),
                "img_type": "['Diagrams']",
                "answer": gold,
                "topic_difficulty": "Easy",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": family,
            }
        )
    return rows


def mathvista(studio: Studio, n: int) -> list[Row]:
    """Rows of MathVista: free answers, integers among them, and multiple choice."""
    rows: list[Row] = []
    for item in range(n):
        draws, is_free = studio.draws(item), item % 4 != 3
        family, turn = turns(item // 4 if not is_free else item - item // 4, OPEN[2:])
        choices: tuple[str, ...] | None = None
        if is_free:
            scene, text, gold = studio.asked(family, turn, draws)
            query = INTEGER_HINT + text if family == "counting" else text
        else:
            choice = studio.choice(family, turn, draws)
            scene, text, choices = choice.scene, choice.text, choice.options
            gold = choices[choice.place]
            listed = [f"\n({a}) {option}" for a, option in zip(LETTERS, choices, strict=True)]
            query = f"{LETTER_HINT}{text}\nChoices:{''.join(listed)}"
        rows.append(
            {
                "pid": str(item + 1),
                "question": text,
                "image": f"images/{item + 1}.jpg",
                "decoded_image": studio.image(scene, str(item + 1)),
                "choices": None if choices is None else list(choices),
                "unit": None,
                "precision": None,
                "answer": gold,
                "question_type": "free_form" if is_free else "multi_choice",
                "answer_type": "integer" if is_free and family == "counting" else "text",
                "metadata": {"category": "general-vqa", "context": "drawing", "task": family},
                "query": query,
            }
        )
    return rows


def chartqa(studio: Studio, n: int) -> list[Row]:
    """Rows of ChartQA: colours of the tallest bars, and numbers of bars."""
    rows: list[Row] = []
    for item in range(n):
        draws, is_number = studio.draws(item), item % 4 == 3
        if is_number:
            number = 3 + item // 4 % 3
            scene = studio.scene("chart", draws, lambda s, k=number: len(s.bars) == k)
            text, gold = "How many bars are in the image?", str(number)
        else:
            scene, text, gold = studio.asked("chart", item - item // 4, draws)
        rows.append(
            {
                "type": "human_test" if item % 2 else "augmented_test",
                "question": text,
                "answer": gold,
                "image": studio.image(scene, str(item)),
            }
        )
    return rows


def _sign(studio: Studio, item: int, draws: Draws) -> tuple[Scene, str, str]:
    """A sign, asked in turn for its colour and its word."""
    names = tuple(COLOURS)
    if item % 2 == 0:
        colour = names[item // 2 % len(names)]
        return studio.scene("sign", draws, lambda s: s.panel == colour), SIGN_COLOUR, colour
    word = WORDS[item // 2 % len(WORDS)]
    return studio.scene("sign", draws, lambda s: s.word == word), SIGN_WORD, word


def ocrbench(studio: Studio, n: int) -> list[Row]:
    """Rows of OCRBench."""
    rows: list[Row] = []
    for item in range(n):
        scene, text, gold = _sign(studio, item, studio.draws(item))
        kind = "Regular Text Recognition" if text == SIGN_WORD else "Scene Text-centric VQA"
        rows.append(
            {
                "dataset": "mini",
                "question": text,
                "question_type": kind,
                "answer": [gold],
                "image": studio.image(scene, str(item)),
            }
        )
    return rows


def textvqa(studio: Studio, n: int) -> list[Row]:
    """Rows of TextVQA; where the word is asked for, three others are among the OCR tokens."""
    rows: list[Row] = []
    for item in range(n):
        draws = studio.draws(item)
        scene, text, gold = _sign(studio, item, draws)
        others = [word for word in WORDS if word != scene.word]
        tokens = (scene.word or "", *(others.pop(draws.below(len(others))) for _ in range(3)))
        px = studio.world.image_px
        rows.append(
            {
                "image_id": f"{item:08d}",
                "question_id": item,
                "question": text,
                "question_tokens": text.lower().rstrip("?").split(),
                "image": studio.image(scene, f"{item:08d}"),
                "image_width": px,
                "image_height": px,
                "answers": [gold] * 8 + ["unanswerable", "not sure"],
                "image_classes": ["Sign"],
                "set_name": "val",
                "ocr_tokens": shuffled(draws, tokens),
            }
        )
    return rows


def docvqa(studio: Studio, n: int) -> list[Row]:
    """Rows of DocVQA's validation split: charts and signs."""
    rows: list[Row] = []
    for item in range(n):
        draws = studio.draws(item)
        if item % 2 == 0:
            scene, text, gold = studio.asked("chart", item // 2, draws)
        else:
            scene, text, gold = _sign(studio, item // 2, draws)
        rows.append(
            {
                "questionId": str(item),
                "question": text,
                "question_types": ["figure/diagram" if item % 2 == 0 else "Image/Photo"],
                "image": studio.image(scene, str(item)),
                "docId": item,
                "ucsf_document_id": f"mini{item:04d}",
                "ucsf_document_page_no": "1",
                "answers": [gold, gold.upper()] if gold != gold.upper() else [gold],
                "data_split": "val",
            }
        )
    return rows


def realworldqa(studio: Studio, n: int) -> list[Row]:
    """Rows of RealWorldQA; a quarter have options, and all say how to answer."""
    rows: list[Row] = []
    for item in range(n):
        draws = studio.draws(item)
        if item % 4 == 3:
            choice = studio.choice("choice", item // 4, draws)
            listed = [f"\n{a}. {text}" for a, text in zip(LETTERS, choice.options, strict=True)]
            scene, gold = choice.scene, choice.letter
            question = f"{choice.text}{''.join(listed)}\n{ONLY_LETTER}"
        else:
            family, turn = turns(item - item // 4, ("colour", "existence", "chart"))
            scene, text, gold = studio.asked(family, turn, draws)
            question = f"{text}\n{SHORT}"
        rows.append(
            {
                "image": studio.image(scene, str(item)),
                "image_path": f"{item}.jpg",
                "question": question,
                "answer": gold,
            }
        )
    return rows
