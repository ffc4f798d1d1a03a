"""Templates, label masks and collation against worked examples of the reference code."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from vocabularies import QWEN_EOS, QWEN_IMAGE, qwen2, smollm, with_bos

from kdscale.core.types import ConfigError, DataError, UnknownName
from kdscale.data.collate import collate, left_padded
from kdscale.data.instruct import (
    IGNORE,
    IMAGE,
    TEMPLATES,
    Encoded,
    chat_template,
    check_template,
    encode,
    encode_prompt,
    prompt,
    render,
    rounds,
)
from kdscale.data.templates import SYSTEM, Round

# Both frameworks' templates for Qwen2's base model, and both caption templates.
CHATS = ("qwen2_base", "phi", "bunny")
CAPTIONS = ("pretrain", "plain")
WHAT = ("<image>\nWhat is this?", "A cat.")
COUNT = ("How many?", "2 cats")
CAT_IDS = [362, 8251, 13, QWEN_EOS]


def encoded(
    turns: list[Round],
    template: str = "qwen2_base",
    has_image: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    visual: int = 1,
    max_length: int = 2048,
) -> Encoded:
    tokenizer = tokenizer or qwen2()
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    assert isinstance(image_id, int)
    return encode(
        turns,
        template,
        has_image,
        tokenizer,
        image_token_id=image_id,
        num_image_tokens=visual,
        max_length=max_length,
    )


def learnt(sample: Encoded) -> dict[int, int]:
    """The supervised places and their ids."""
    places = np.flatnonzero(sample.labels != IGNORE).tolist()
    assert sample.labels[places].tolist() == sample.input_ids[places].tolist()
    return {place: int(sample.labels[place]) for place in places}


# -- the worked examples ---------------------------------------------------------------------


@pytest.mark.parametrize("template", CHATS)
def test_example_1_image_and_answer(template: str) -> None:
    assert len(qwen2()(f"{SYSTEM} ").input_ids) == 29
    sample = encoded([WHAT], template)
    assert len(sample.input_ids) == 45
    assert sample.input_ids[31] == QWEN_IMAGE
    assert qwen2().convert_ids_to_tokens(sample.input_ids[28:31].tolist()) == ["ĠUSER", ":", "Ġ"]
    assert learnt(sample) == dict(zip(range(41, 45), CAT_IDS, strict=True))
    assert qwen2().convert_ids_to_tokens(CAT_IDS) == ["ĠA", "Ġcat", ".", "<|endoftext|>"]


@pytest.mark.parametrize("template", CHATS)
def test_example_2_numeric_answer_teaches_a_lone_space(template: str) -> None:
    sample = encoded([("<image>\nHow many dogs?", "3")], template)
    assert len(sample.input_ids) == 44
    assert learnt(sample) == {41: 220, 42: 18, 43: QWEN_EOS}
    assert qwen2().convert_ids_to_tokens([220, 18]) == ["Ġ", "3"]


@pytest.mark.parametrize("template", CHATS)
def test_example_3_image_moves_to_the_front_of_its_turn(template: str) -> None:
    sample = encoded([("What color is it?\n<image>", "Red")], template)
    assert len(sample.input_ids) == 44
    assert np.flatnonzero(sample.input_ids == QWEN_IMAGE).tolist() == [31]
    assert learnt(sample) == {42: 3731, 43: QWEN_EOS}
    assert qwen2().convert_ids_to_tokens([3731]) == ["ĠRed"]


@pytest.mark.parametrize("template", CHATS)
def test_example_4_two_rounds(template: str) -> None:
    sample = encoded([WHAT, COUNT], template)
    assert len(sample.input_ids) == 58
    second = dict(zip(range(54, 58), [220, 17, 19423, QWEN_EOS], strict=True))
    assert learnt(sample) == dict(zip(range(41, 45), CAT_IDS, strict=True)) | second
    assert qwen2().convert_ids_to_tokens([220, 17, 19423]) == ["Ġ", "2", "Ġcats"]


@pytest.mark.parametrize("template", CHATS)
def test_example_5_text_only(template: str) -> None:
    sample = encoded([("Hi", "Hello!")], template, has_image=False)
    assert len(sample.input_ids) == 38
    assert learnt(sample) == {35: 21927, 36: 0, 37: QWEN_EOS}
    assert qwen2().convert_ids_to_tokens([21927, 0]) == ["ĠHello", "!"]


@pytest.mark.parametrize("template", CAPTIONS)
@pytest.mark.parametrize("question", ["<image>\nDescribe it.", "What is it?\n<image>"])
def test_example_6_caption_without_end(template: str, question: str) -> None:
    sample = encoded([(question, "a cat on a mat")], template)
    assert sample.input_ids.tolist() == [QWEN_IMAGE, 64, 8251, 389, 264, 5517, 198]
    assert sample.labels.tolist() == [IGNORE, 64, 8251, 389, 264, 5517, 198]
    tokens = qwen2().convert_ids_to_tokens(sample.input_ids[1:].tolist())
    assert tokens == ["a", "Ġcat", "Ġon", "Ġa", "Ġmat", "Ċ"]


EXAMPLES: list[tuple[list[Round], str, bool]] = [
    *[([WHAT], template, True) for template in CHATS],
    ([("<image>\nHow many dogs?", "3")], "qwen2_base", True),
    ([("What color is it?\n<image>", "Red")], "bunny", True),
    ([WHAT, COUNT], "bunny", True),
    ([COUNT, WHAT], "qwen2_base", True),
    ([("Hi", "Hello!")], "phi", False),
    *[([("<image>", "a cat on a mat")], template, True) for template in CAPTIONS],
]


@pytest.mark.parametrize(("turns", "template", "has_image"), EXAMPLES)
@pytest.mark.parametrize("tokenizer", [qwen2, smollm])
def test_example_7_one_pass_equals_chunks(
    turns: list[Round], template: str, has_image: bool, tokenizer: Any
) -> None:
    sample = encoded(turns, template, has_image, tokenizer())
    expected: list[int] = []
    for place, chunk in enumerate(render(turns, template, has_image).split(IMAGE)):
        expected += [tokenizer().convert_tokens_to_ids(IMAGE)] if place else []
        expected += tokenizer()(chunk).input_ids
    assert sample.input_ids.tolist() == expected


@pytest.mark.parametrize("visual", [728, 729, 256, 196, 49])
@pytest.mark.parametrize(("turns", "template"), [([WHAT, COUNT], "bunny"), ([WHAT], "pretrain")])
def test_example_8_expanded_length(turns: list[Round], template: str, visual: int) -> None:
    short, full = (encoded(turns, template, visual=count) for count in (1, visual))
    assert len(full.input_ids) == len(full.labels) == len(short.input_ids) - 1 + visual
    place = int(np.argmax(full.input_ids == QWEN_IMAGE))
    inside = slice(place, place + visual)
    assert (full.input_ids[inside] == QWEN_IMAGE).all()
    assert (full.labels[inside] == IGNORE).all()
    moved = {key + visual - 1: value for key, value in learnt(short).items()}
    assert learnt(full) == moved


# -- other tokenizers ------------------------------------------------------------------------


def test_instruct_template_with_the_instruct_tokenizer() -> None:
    end = 151645
    sample = encoded([WHAT, COUNT], "qwen2_instruct", tokenizer=qwen2(instruct=True))
    first = dict(zip(range(41, 45), [*CAT_IDS[:3], end], strict=True))
    assert learnt(sample) == first | dict(zip(range(54, 58), [220, 17, 19423, end], strict=True))


def test_instruct_template_with_the_base_tokenizer_is_refused() -> None:
    # The reference counts the terminators although they are no padding, and masks everything.
    assert learnt(encoded([WHAT], "qwen2_instruct")) == {}
    with pytest.raises(ConfigError, match="masks every sample"):
        checked("qwen2_instruct", qwen2())
    checked("qwen2_instruct", qwen2(instruct=True))


def checked(template: str, tokenizer: PreTrainedTokenizerFast, visual: int = 196) -> None:
    image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    check_template(
        template, tokenizer, image_token_id=image_id, num_image_tokens=visual, max_length=2048
    )


@pytest.mark.parametrize("template", [*CHATS, *CAPTIONS])
@pytest.mark.parametrize("tokenizer", [qwen2, smollm])
def test_templates_of_the_recipes_fit_their_tokenizers(template: str, tokenizer: Any) -> None:
    checked(template, tokenizer())


def test_smollm_special_ids() -> None:
    assert smollm().eos_token_id == smollm().bos_token_id == smollm().pad_token_id == 0
    assert smollm().convert_ids_to_tokens([0, 2, 16]) == [
        "<|endoftext|>",
        "<|im_end|>",
        "<empty_output>",
    ]
    assert sorted(smollm().added_tokens_decoder)[:17] == list(range(17))


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize(
    ("answer", "tokens"), [("A cat.", ["ĠA", "Ġcat", "."]), ("3", ["Ġ", "3"]), ("42", "Ġ42")]
)
def test_smollm_masks(template: str, answer: str, tokens: list[str]) -> None:
    sample = encoded([("<image>\nWhat?", answer), ("And?", answer)], template, tokenizer=smollm())
    found = smollm().convert_ids_to_tokens(list(learnt(sample).values()))
    assert found == [*tokens, "<|endoftext|>"] * 2
    places = list(learnt(sample))
    for start in (places[0], places[len(tokens) + 1]):
        assert str(smollm().decode(sample.input_ids[:start])).endswith("ASSISTANT:")


def test_caption_of_smollm() -> None:
    sample = encoded([("<image>", "A cat")], "plain", tokenizer=smollm(), visual=3)
    assert sample.labels[:3].tolist() == [IGNORE] * 3
    assert smollm().decode(sample.labels[3:]) == "A cat\n"
    assert 0 not in sample.input_ids


def test_llama_begins_with_bos() -> None:
    sample = encoded([WHAT, COUNT], "llama", tokenizer=with_bos())
    assert sample.input_ids[0] == 1
    assert (sample.input_ids == 1).sum() == 1
    found = with_bos().decode(list(learnt(sample).values()))
    assert found == " A cat.</s> 2 cats</s>"
    caption = encoded([WHAT], "pretrain", tokenizer=with_bos())
    assert caption.labels[:2].tolist() == [IGNORE, IGNORE]
    assert with_bos().decode(caption.labels[2:]) == "A cat.\n"
    with pytest.raises(ConfigError, match="adds a BOS"):
        encoded([WHAT], "llama", tokenizer=smollm())
    with pytest.raises(ConfigError, match="splits into"):
        checked("llama", smollm())


def test_tokenizer_needs_the_image_as_one_token() -> None:
    with pytest.raises(ConfigError, match="special token of that id"):
        encode(
            [WHAT],
            "bunny",
            True,
            qwen2(),
            image_token_id=QWEN_IMAGE + 1,
            num_image_tokens=1,
            max_length=99,
        )


# -- masks by an own rule --------------------------------------------------------------------


def by_offsets(turns: list[Round], template: str, has_image: bool, tokenizer: Any) -> list[int]:
    """Labels from the characters that each token covers; no text here is malformed."""
    text = render(turns, template, has_image)
    found = tokenizer(text, return_offsets_mapping=True)
    spans, at = [], 0
    end = TEMPLATES[template].terminator
    for _ in turns:
        start = text.index(" ASSISTANT:", at) + len(" ASSISTANT:")
        at = text.index(end, start) + len(end)
        spans.append((start, at))
    return [
        token if any(start <= left and right <= stop for start, stop in spans) else IGNORE
        for token, (left, right) in zip(found.input_ids, found.offset_mapping, strict=True)
    ]


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("tokenizer", [qwen2, smollm])
def test_drawn_conversations(template: str, tokenizer: Any) -> None:
    drawn = random.Random(0)
    words = ["cat", "A", "7", "12.5", "(B)", "l'été", "日本", "\n", "\n\n", " ", "ASSISTANT"]
    for _ in range(60):
        texts = [" ".join(drawn.choices(words, k=drawn.randint(0, 9))) for _ in range(8)]
        turns = list(zip(texts[::2], texts[1::2], strict=True))[: drawn.randint(1, 4)]
        has_image = drawn.random() < 0.5
        sample = encoded(turns, template, has_image, tokenizer())
        assert learnt(sample)
        assert sample.labels.tolist() == by_offsets(turns, template, has_image, tokenizer())


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize(
    "answer", ["one<|endoftext|>two", "so ASSISTANT: yes", "<|endoftext|>", "x<|endoftext|> "]
)
def test_samples_that_do_not_add_up_are_masked_whole(template: str, answer: str) -> None:
    sample = encoded([WHAT, ("Really?", answer), COUNT], template)
    assert learnt(sample) == {}
    # Beyond the length the references compare nothing and keep the rounds before the odd one.
    far = encoded([WHAT, ("Really?", answer), COUNT], template, max_length=44)
    assert learnt(far) == dict(zip(range(41, 44), CAT_IDS[:3], strict=True))


def test_bunny_counts_text_only_samples_after_their_cut() -> None:
    turns = [("Hi", "Hello!")] * 3
    length = len(encoded(turns, has_image=False).input_ids)

    def counts(lost: int) -> list[int]:
        cut = [encoded(turns, name, False, max_length=length - lost) for name in CHATS]
        return [len(learnt(sample)) for sample in cut]

    # A lost end makes up for itself; with a lost word before it the lengths differ, until the
    # text without its three ends is as long as the cut.
    assert [counts(lost) for lost in range(4)] == [[9, 9, 9], [8, 8, 8], [7, 7, 0], [6, 6, 6]]


# -- cuts ------------------------------------------------------------------------------------


def test_text_is_cut_with_the_image_counted_in_full() -> None:
    turns = [WHAT, ("Tell me more.", "word " * 3000)]
    whole = encoded(turns, "bunny", visual=256, max_length=10_000)
    for name in CHATS:
        cut = encoded(turns, name, visual=256)
        assert len(cut.input_ids) == len(cut.labels) == 2048
        assert cut.input_ids.tolist() == whole.input_ids[:2048].tolist()
        assert cut.labels.tolist() == whole.labels[:2048].tolist()
        assert learnt(cut)
    caption = encoded([("<image>", "word " * 3000)], "pretrain", visual=729)
    assert len(caption.input_ids) == 2048
    assert len(learnt(caption)) == 2048 - 729


def test_image_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="729 tokens at place 31 does not fit into"):
        encoded([WHAT], visual=729, max_length=512)
    with pytest.raises(ConfigError, match="does not fit"):
        encoded([("<image>", "a cat")], "plain", visual=729, max_length=512)
    late = [("Tell me a story.", "word " * 60), WHAT]
    alone = encoded(late[:1], has_image=False)
    sample = encoded(late, visual=49, max_length=140)
    assert QWEN_IMAGE not in sample.input_ids
    assert learnt(sample) == learnt(alone)
    batch = collate([sample], [np.ones((8, 8, 3), np.uint8)], **SMALL)
    assert not batch["pixel_values"].any()


def test_check_wants_room_for_text() -> None:
    with pytest.raises(ConfigError, match="no room for text"):
        checked("bunny", qwen2(), visual=2040)


# -- texts -----------------------------------------------------------------------------------


def test_literal_texts() -> None:
    begin = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    first = "USER: <image>\nWhat is this? ASSISTANT: A cat."
    second = "USER: How many? ASSISTANT: 2 cats"
    ends = dict.fromkeys(CHATS, "<|endoftext|>") | {"qwen2_instruct": "<|im_end|>", "llama": "</s>"}
    assert set(ends) | set(CAPTIONS) == set(TEMPLATES)
    for name, end in ends.items():
        assert render([WHAT, COUNT], name, True) == f"{begin}{first}{end}{second}{end}"
        assert prompt(WHAT[0], name, True) == f"{begin}USER: <image>\nWhat is this? ASSISTANT:"
        assert prompt("Hi", name, False) == f"{begin}USER: Hi ASSISTANT:"
    for name in CAPTIONS:
        assert render([WHAT], name, True) == "<image>A cat.\n"
        assert prompt(WHAT[0], name, True) == IMAGE


def test_every_sample_has_one_image_or_none() -> None:
    odd = [("Hi", "see <image>"), (" a <image> b <image>", "yes"), ("<image>", "no")]
    text = render(odd, "bunny", True)
    assert text.count(IMAGE) == 1
    assert "USER: <image>\na  b ASSISTANT: yes" in text
    assert IMAGE not in render(odd, "bunny", False)
    assert "USER: <image>\nHi ASSISTANT: Hello!" in render([("Hi", "Hello!")], "bunny", True)
    assert "USER: <image> ASSISTANT: no" in render(odd[2:], "bunny", True)


@pytest.mark.parametrize("template", CAPTIONS)
def test_caption_templates_take_one_pair(template: str) -> None:
    with pytest.raises(DataError, match="2 rounds"):
        render([WHAT, COUNT], template, True)
    with pytest.raises(DataError, match="no image"):
        render([WHAT], template, False)
    with pytest.raises(DataError, match="no image"):
        prompt("Hi", template, False)
    with pytest.raises(UnknownName, match="Did you mean"):
        render([WHAT], "qwen2_bas", True)


def turn(speaker: str, value: Any = "x") -> dict[str, Any]:
    return {"from": speaker, "value": value}


def test_rounds() -> None:
    talk = [turn("human", "q1"), turn("gpt", "a1"), turn("human", "q2"), turn("gpt", "a2")]
    assert rounds(talk) == [("q1", "a1"), ("q2", "a2")]
    assert rounds([turn("gpt", "Welcome"), *talk]) == [("q1", "a1"), ("q2", "a2")]


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "text",
        {},
        [],
        ["text"],
        [turn("gpt")],
        [turn("human")],
        [turn("human"), turn("human")],
        [turn("gpt"), turn("gpt"), turn("human")],
        [turn("human"), turn("gpt"), turn("human")],
        [turn("system"), turn("human"), turn("gpt")],
        [turn("human"), turn("gpt", None)],
        [{"value": "x"}, turn("gpt")],
    ],
)
def test_rounds_of_another_shape(bad: Any) -> None:
    with pytest.raises(DataError):
        rounds(bad)


# -- chat templates --------------------------------------------------------------------------


def messages(turns: list[Round], as_list: bool) -> list[dict[str, Any]]:
    """The conversation in the hub's form, its image in the text or beside it."""
    found = []
    for question, answer in turns:
        content: Any = question
        if as_list:
            parts = [{"type": "image"}] * (IMAGE in question)
            content = [*parts, {"type": "text", "text": question.replace(IMAGE, "").strip()}]
        reply: Any = [{"type": "text", "text": answer}] if as_list else answer
        found += [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return found


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("template", [*CHATS, "qwen2_instruct", "llama"])
@pytest.mark.parametrize(
    "turns",
    [[WHAT], [COUNT], [WHAT, COUNT], [COUNT, WHAT], [("Which?\n<image>", "{{ 'x' }} \"q\"\n")]],
)
def test_chat_template_is_the_training_text(
    turns: list[Round], template: str, as_list: bool
) -> None:
    has_image = any(IMAGE in question for question, _ in turns)

    def applied(said: list[dict[str, Any]], start: bool) -> Any:
        return smollm().apply_chat_template(
            said,
            chat_template=chat_template(template),
            tokenize=False,
            add_generation_prompt=start,
        )

    said = messages(turns, as_list)
    assert applied(said, False) == render(turns, template, has_image)
    question = turns[-1][0]
    assert applied(said[-2:-1], True) == prompt(question, template, IMAGE in question)
    before = applied(said[:-1], True)
    assert before.endswith(" ASSISTANT:")
    assert render(turns, template, has_image).startswith(f"{before} ")


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("template", CAPTIONS)
def test_caption_templates_as_chat(template: str, as_list: bool) -> None:
    said = messages([WHAT], as_list)
    apply: Any = smollm().apply_chat_template
    how = {"chat_template": chat_template(template), "tokenize": False}
    assert apply(said, **how) == render([WHAT], template, True)
    assert apply(said[:1], add_generation_prompt=True, **how) == prompt(WHAT[0], template, True)
    with pytest.raises(Exception, match="needs an image"):
        apply(messages([COUNT], as_list), **how)


def test_chat_template_with_other_roles() -> None:
    apply: Any = smollm().apply_chat_template
    how = {"chat_template": chat_template("bunny"), "tokenize": False}
    user = {"role": "user", "content": "Hi"}
    said = [{"role": "system", "content": "Be brief."}, user]
    text = apply(said, add_generation_prompt=True, **how)
    assert text == "Be brief. USER: Hi ASSISTANT:"
    with pytest.raises(Exception, match="user or assistant, not tool"):
        apply([user, {"role": "tool", "content": "x"}], **how)


def test_saved_tokenizer_keeps_its_template(tmp_path: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=smollm().backend_tokenizer)
    tokenizer.chat_template = chat_template("bunny")
    tokenizer.save_pretrained(tmp_path)
    again: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = again.apply_chat_template(
        messages([WHAT], True)[:1], add_generation_prompt=True, return_dict=False
    )
    assert ids == smollm()(prompt(WHAT[0], "bunny", True)).input_ids


# -- micro-batches ---------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "pad_id": QWEN_EOS,
    "image_token_id": QWEN_IMAGE,
    "num_image_tokens": 4,
    "pixel_shape": (8, 8, 3),
}


def picture(value: int) -> np.ndarray[Any, Any]:
    return np.full((8, 8, 3), value, np.uint8)


def test_padding_that_is_the_end_leaves_real_ends_alone() -> None:
    long, short = encoded([WHAT, COUNT], visual=4), encoded([("Hi", "Hello!")], has_image=False)
    batch = collate([short, long], [None, picture(7)], **SMALL)
    length = len(long.input_ids)
    assert {name: tuple(column.shape) for name, column in batch.items()} == {
        "input_ids": (2, length),
        "attention_mask": (2, length),
        "labels": (2, length),
        "pixel_values": (1, 8, 8, 3),
    }
    assert batch["attention_mask"].sum(1).tolist() == [38, length]
    assert batch["attention_mask"][0, :38].all()
    assert (batch["input_ids"][0, 37:] == QWEN_EOS).all()
    assert batch["labels"][0, 37] == QWEN_EOS
    assert (batch["labels"][0, 38:] == IGNORE).all()
    assert batch["labels"][1].tolist() == long.labels.tolist()
    assert batch["pixel_values"].dtype == torch.uint8
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {
        torch.int64
    }


def test_images_come_in_the_order_of_their_tokens() -> None:
    with_image, without = encoded([WHAT], visual=4), encoded([COUNT], has_image=False)
    samples = [with_image, without, with_image]
    batch = collate(samples, [picture(1), None, picture(2)], **SMALL)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    assert int((batch["input_ids"] == QWEN_IMAGE).sum()) == 2 * 4


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 3), torch.uint8), ((4, 16), torch.float16)])
def test_micro_batch_without_images_brings_an_unseen_one(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    samples = [encoded([COUNT], has_image=False), encoded([COUNT] * 2, has_image=False)]
    small: dict[str, Any] = {**SMALL, "pixel_shape": shape}
    batch = collate(samples, [None, None], **small)
    first = len(samples[0].input_ids)
    assert batch["pixel_values"].dtype == dtype
    assert tuple(batch["pixel_values"].shape) == (1, *shape)
    assert not batch["pixel_values"].any()
    places = torch.nonzero(batch["input_ids"] == QWEN_IMAGE).tolist()
    assert places == [[0, first + i] for i in range(4)]
    for row, sample in enumerate(samples):
        seen = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][seen].tolist() == sample.input_ids.tolist()
        assert batch["labels"][row][seen].tolist() == sample.labels.tolist()
        assert (batch["labels"][row][~seen] == IGNORE).all()


def test_cached_features_stay_as_they_are() -> None:
    features = np.arange(64, dtype=np.float16).reshape(4, 16)
    small: dict[str, Any] = {**SMALL, "pixel_shape": (4, 16)}
    batch = collate([encoded([WHAT], visual=4)], [features], **small)
    assert torch.equal(batch["pixel_values"], torch.from_numpy(features)[None])


def test_images_and_tokens_must_match() -> None:
    sample = encoded([WHAT], visual=4)
    with pytest.raises(DataError, match="4 image tokens and no image"):
        collate([sample], [None], **SMALL)
    with pytest.raises(DataError, match="5 image tokens"):
        collate([encoded([WHAT], visual=5)], [picture(1)], **SMALL)
    with pytest.raises(DataError, match="shape"):
        collate([sample], [np.zeros((9, 8, 3), np.uint8)], **SMALL)
    with pytest.raises(DataError, match="no micro-batch"):
        collate([], [], **SMALL)


def test_prompts_are_padded_on_the_left() -> None:
    rows = [
        encode_prompt(
            question,
            "bunny",
            IMAGE in question,
            qwen2(),
            image_token_id=QWEN_IMAGE,
            num_image_tokens=4,
        )
        for question in (WHAT[0], "Hi")
    ]
    assert (rows[0] == QWEN_IMAGE).sum() == 4
    text = prompt(WHAT[0], "bunny", True).replace(IMAGE, IMAGE * 4)
    assert qwen2().decode(rows[0]) == text
    # What generation starts from is what training saw before the answer.
    seen = encoded([WHAT], "bunny", visual=4)
    assert rows[0].tolist() == seen.input_ids[: min(learnt(seen))].tolist()
    batch = left_padded(rows, pad_id=QWEN_EOS)
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    for row, ids in enumerate(rows):
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids.tolist()
        assert batch["attention_mask"][row, -len(ids) :].all()
    with pytest.raises(DataError, match="no prompts"):
        left_padded([], pad_id=0)


def test_data_tasks_need_no_torch() -> None:
    code = (
        "import sys; import kdscale.data.collate; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
