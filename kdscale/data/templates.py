"""Conversations as text: the templates of TinyLLaVA Factory and Bunny, and their Jinja.

Texts are those of TinyLLaVA Factory (53f12c7) and Bunny (08273ac). Departures, all where the
references would fail or where their data have no such sample: a sample with an image has exactly
one image turn (the first that asks for it, else the first), a sample without an image has none,
and Bunny's rendering of empty texts is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdscale.core.types import DataError, unknown_name

Round = tuple[str, str]

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_USER, _ASSISTANT = "USER", "ASSISTANT"
SEPARATOR = f" {_ASSISTANT}: "


@dataclass(frozen=True, kw_only=True)
class TemplateSpec:
    """How a conversation becomes text.

    Attributes:
        terminator: What ends an answer and is learnt with it; empty for caption templates, which
            are the image and the answer and no more.
        bos: The text is meant to follow the tokenizer's BOS.
        check: Whose rule says that a sample's lengths do not add up (`kdscale.data.instruct`).
    """

    terminator: str
    bos: bool = False
    check: Literal["tinyllava", "bunny"] = "tinyllava"


TEMPLATES: dict[str, TemplateSpec] = {
    "pretrain": TemplateSpec(terminator=""),
    "plain": TemplateSpec(terminator="", check="bunny"),
    "qwen2_base": TemplateSpec(terminator="<|endoftext|>"),
    "phi": TemplateSpec(terminator="<|endoftext|>"),
    "bunny": TemplateSpec(terminator="<|endoftext|>", check="bunny"),
    "qwen2_instruct": TemplateSpec(terminator="<|im_end|>"),
    "llama": TemplateSpec(terminator="</s>", bos=True),
}


def rounds(conversations: Any) -> list[Round]:
    """Pairs the questions of a conversation with their answers.

    Args:
        conversations: `[{"from": "human" | "gpt", "value": str}, ...]`, taking turns; a first
            turn by gpt is skipped.

    Raises:
        DataError: The turns are of another shape, or a question has no answer.
    """
    if not isinstance(conversations, list | tuple) or not conversations:
        raise DataError(f"conversations are a list of turns, not {conversations!r:.80}")
    texts = [_turn(turn, place) for place, turn in enumerate(conversations)]
    speakers = [turn["from"] for turn in conversations]
    skipped = int(speakers[0] == "gpt")
    texts, speakers = texts[skipped:], speakers[skipped:]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise DataError(
            "after an optional first turn by gpt, questions by human and answers by gpt take "
            f"turns; found {', '.join(speakers) or 'nothing'}"
        )
    return list(zip(texts[::2], texts[1::2], strict=True))


def _turn(turn: Any, place: int) -> str:
    """Returns the text of a turn."""
    if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
        raise DataError(f"turn {place} is not by human or gpt: {turn!r:.80}")
    if not isinstance(turn.get("value"), str):
        raise DataError(f"turn {place} has no text as its value: {turn!r:.80}")
    return turn["value"]


def render(rounds: Sequence[Round], template: str, has_image: bool) -> str:
    """Writes the text of a training sample; it holds one `<image>` where there is an image.

    Raises:
        UnknownName: There is no such template.
        DataError: A caption template was given several rounds or no image.
    """
    spec = spec_of(template)
    if not spec.terminator:
        _captions_only(template, len(rounds), has_image)
        return f"{IMAGE}{_without_image(rounds[0][1])}\n"
    asked = [place for place, (question, _) in enumerate(rounds) if IMAGE in question]
    image_turn = (asked or [0])[0] if has_image else None
    text = f"{SYSTEM} "
    for place, (question, answer) in enumerate(rounds):
        text += f"{_USER}: {_question(question, place == image_turn)}"
        text += f"{SEPARATOR}{_without_image(answer)}{spec.terminator}"
    return text


def prompt(question: str, template: str, has_image: bool) -> str:
    """Writes what the model reads before it answers; it ends at `ASSISTANT:`, without a space.

    A caption template's prompt is the image alone, whatever the question.

    Raises:
        UnknownName: There is no such template.
        DataError: A caption template was given no image.
    """
    if not spec_of(template).terminator:
        _captions_only(template, 1, has_image)
        return IMAGE
    return f"{SYSTEM} {_USER}: {_question(question, has_image)} {_ASSISTANT}:"


def chat_template(template: str) -> str:
    """Writes a template in Jinja, for the `chat_template` of tokenizers and processors.

    A message's content is a string, which may hold `<image>`, or a list of `image` and `text`
    parts. With `add_generation_prompt` one question gives `prompt`; complete conversations give
    `render`. A leading system message replaces the system sentence.
    """
    spec = spec_of(template)
    if not spec.terminator:
        return _JINJA_TEXT + _JINJA_CAPTION
    names = {"SYSTEM": SYSTEM, "TERMINATOR": spec.terminator}
    assigned = "".join(
        f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in names.items()
    )
    return assigned + _JINJA_TEXT + _JINJA_CHAT


def spec_of(template: str) -> TemplateSpec:
    """Looks a template up."""
    if template not in TEMPLATES:
        raise unknown_name("template", template, TEMPLATES)
    return TEMPLATES[template]


def _captions_only(template: str, num_rounds: int, has_image: bool) -> None:
    """Refuses what a caption template cannot say."""
    if num_rounds != 1 or not has_image:
        image = "an image" if has_image else "no image"
        raise DataError(
            f"template {template!r} takes one image and one answer, not {num_rounds} rounds with "
            f"{image}; conversations need a chat template such as 'qwen2_base'"
        )


def _question(question: str, image: bool) -> str:
    """Puts the image, where the turn has one, first and nowhere else."""
    question = _without_image(question)
    return f"{IMAGE}\n{question.strip()}".strip() if image else question


def _without_image(text: str) -> str:
    """Takes image placeholders out; other text stays as it is."""
    return text.replace(IMAGE, "").strip() if IMAGE in text else text


_JINJA_TEXT = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_JINJA_CHAT = """\
{%- if messages and messages[0].role == 'system' -%}
{{- text_of(messages[0].content) + ' ' -}}
{%- set turns = messages[1:] -%}
{%- else -%}
{{- SYSTEM + ' ' -}}
{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
{%- set text = text_of(turn.content) -%}
{%- set bare = text.replace('<image>', '').strip() -%}
{%- if turn.role == 'user' -%}
{%- if '<image>' in text -%}
{%- set text = ('<image>\\n' + bare).strip() -%}
{%- endif -%}
{{- 'USER: ' + text + ' ' -}}
{%- elif turn.role == 'assistant' -%}
{%- if '<image>' in text -%}{%- set text = bare -%}{%- endif -%}
{{- 'ASSISTANT: ' + text + TERMINATOR -}}
{%- else -%}
{{- raise_exception('a turn is by user or assistant, not ' + turn.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_JINJA_CAPTION = """\
{%- for turn in messages -%}
{%- set text = text_of(turn.content) -%}
{%- if turn.role == 'user' -%}
{%- if '<image>' not in text -%}
{{- raise_exception('a caption needs an image') -}}
{%- endif -%}
{{- '<image>' -}}
{%- elif turn.role == 'assistant' -%}
{%- if '<image>' in text -%}{%- set text = text.replace('<image>', '').strip() -%}{%- endif -%}
{{- text + '\\n' -}}
{%- else -%}
{{- raise_exception('a turn is by user or assistant, not ' + turn.role) -}}
{%- endif -%}
{%- endfor -%}
"""
