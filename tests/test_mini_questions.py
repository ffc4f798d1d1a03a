"""The miniature world's conversations, held-out questions and language models."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaConfig

from kdscale.core import catalog, catalog_mini
from kdscale.core.config import MiniWorld
from kdscale.core.keys import describe
from kdscale.core.types import ConfigError
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.mini import vocabulary
from kdscale.mini.build import (
    encode_sample,
    sample_key,
    write_instruct_json,
    write_questions,
    write_world,
)
from kdscale.mini.captions import captions
from kdscale.mini.conversations import IMAGE, TEXT_SHARE, converse
from kdscale.mini.language import END_ID, IMAGE_ID, tokenizer
from kdscale.mini.paint import render
from kdscale.mini.questions import (
    ANSWERS,
    CHANCE,
    FAMILIES,
    LETTER,
    LETTERS,
    PLACES,
    SHORT,
    Question,
    ask,
    askable,
    eval_item,
    eval_items,
    group_of,
)
from kdscale.mini.scenes import (
    HELD_OUT,
    KINDS,
    RELATIONS,
    TRAIN_PAIRS,
    Draws,
    Scene,
    draw,
    draw_kind,
)

PAIRS = MiniWorld(seed=5, num_samples=60, samples_per_shard=25, caption_noise=0.2)
TALK = MiniWorld(seed=5, num_samples=40, samples_per_shard=25, image_px=32, content="instruct")
HELD = TALK.replace(split="eval", num_samples=140)


@pytest.fixture(scope="module")
def talks():
    """Seven hundred training conversations."""
    return [converse(TALK, index) for index in range(700)]


@pytest.fixture(scope="module")
def items():
    """Held-out scenes and questions, each answer equally often."""
    return [eval_item(HELD, index) for index in range(80 * len(FAMILIES))]


@pytest.fixture(scope="module")
def asked():
    """Training scenes, each with a question of every family that fits."""
    found: list[tuple[Scene, Question]] = []
    for index in range(1500):
        draws = Draws("asked", index)
        scene = draw_kind(draws, tuple(KINDS)[index % len(KINDS)], TRAIN_PAIRS)
        found += [(scene, ask(name, scene, draws, TRAIN_PAIRS)) for name in askable(scene)]
    return found


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "cd7feb2d8015db5c"), ("eval", "98a7e2a3044e3f5e")]
)
def test_caption_worlds_are_what_they_were(split: Any, digest: str):
    world = PAIRS.replace(split=split)
    total = hashlib.sha256()
    for index in range(60):
        total.update(render(draw(world, index), 48).tobytes())
        files = encode_sample(world, index, sample_key(world, index))
        assert list(files) == ["jpg", "txt", "json"]
        total.update(files["txt"] + files["json"])
    assert total.hexdigest()[:16] == digest


def test_content_enters_the_key_only_where_it_is_new():
    assert "content" not in describe(PAIRS, {})
    assert describe(PAIRS.replace(content="pretrain"), {})["content"] == "pretrain"
    assert describe(TALK, {})["content"] == "instruct"


def test_pretraining_adds_conversations_to_the_same_pairs():
    world, last = PAIRS.replace(content="pretrain"), 0
    for index in range(60):
        key = sample_key(world, index)
        plain, more = encode_sample(PAIRS, index, key), encode_sample(world, index, key)
        assert (more["jpg"], more["txt"]) == (plain["jpg"], plain["txt"])
        record = json.loads(more["json"])
        assert json.loads(plain["json"]).items() <= record.items()
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert gpt["value"] == more["txt"].decode()
        assert human["value"].count(IMAGE) == 1
        last += human["value"].endswith("\n" + IMAGE)
        assert record["id"] == key
        assert record["image"] == f"{key[:5]}/{key}.jpg"
    assert 15 < last < 45, "the image stands before or after the request"


def test_conversations_have_llavas_form(talks):
    for index, talk in enumerate(talks):
        assert [turn["from"] for turn in talk.turns] == ["human", "gpt"] * (len(talk.turns) // 2)
        assert all(set(turn) == {"from", "value"} and turn["value"] for turn in talk.turns)
        images = [turn["value"].count(IMAGE) for turn in talk.turns]
        assert images == [int(talk.scene is not None), *[0] * (len(images) - 1)]
        assert talk.num_words == len(" ".join(turn["value"] for turn in talk.turns).split())
        assert converse(TALK, index) == talk
        if index == 50:
            break
    assert {len(talk.turns) for talk in talks} == {2, 4, 6}
    share = sum(talk.modality == "text" for talk in talks) / len(talks)
    assert share == pytest.approx(TEXT_SHARE, abs=0.035)


def holds(scene: Scene, question: Question) -> bool:
    """Whether the answer follows from the facts that the drawing recorded."""
    facts, text, gold = scene.facts(), question.text, question.gold
    things = [f"{thing['colour']} {thing['shape']}" for thing in facts["objects"]]
    if question.family == "existence":
        name = re.fullmatch(r"Is there an? (.+) in the image\?", text)
        return name is not None and (name[1] in things) == (gold == "Yes")
    if question.family == "counting":
        return gold == str(facts["count"])
    if question.family == "colour":
        boxes = [thing["box"] for thing in facts["objects"]]
        middles = np.array([(left + right, top + down) for left, top, right, down in boxes])
        sides = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
        found = re.search(r"(left|right|top|bottom)\?$", text)
        axis, sign = sides[found[1]] if found else (0, 1)
        return gold == facts["objects"][int((sign * middles[:, axis]).argmin())]["colour"]
    if question.family == "relation":
        names = re.fullmatch(r"Where is the (.+) relative to the (.+)\?", text)
        assert names is not None
        turned = [names[1], names[2]] != things
        relation = RELATIONS[facts["relation"]][0] if turned else facts["relation"]
        return sorted(names.groups()) == sorted(things) and gold == PLACES[relation]
    if question.family == "choice":
        there = [option in things for option in question.options]
        return there.index(True) == LETTERS.index(gold) and sum(there) >= 1
    if question.family == "text":
        return gold == facts["text"]
    return gold == (facts["tallest"] if question.family == "chart" else gold)


def test_answers_follow_from_the_facts(asked, items):
    families = Counter()
    for scene, question in asked + items:
        assert holds(scene, question), (question, scene.facts())
        if question.family == "caption":
            assert question.gold in captions(scene)
        elif question.family != "choice":
            assert question.gold in ANSWERS[question.family]
        families[question.family] += 1
    assert set(families) == {*FAMILIES, "caption"}


def test_only_one_option_is_in_the_image(asked, items):
    for scene, question in asked + items:
        names = {thing.name for thing in scene.things}
        assert not question.options or len(names & set(question.options)) == 1
        assert len(set(question.options)) == len(question.options) in (0, 4)


def test_prompts_end_as_llavas_do(asked):
    for _, question in asked:
        if question.family == "caption":
            assert "\n" not in question.prompt
            continue
        assert question.prompt.startswith(question.text)
        assert question.prompt.endswith(LETTER if question.options else SHORT)
        lines = question.prompt.split("\n")[1:-1]
        assert lines == [f"{a}. {b}" for a, b in zip(LETTERS, question.options, strict=False)]


def test_training_answers_are_balanced(asked):
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked:
        answers[question.family][question.gold] += 1
        if question.family == "existence":
            for word in question.text.split()[3:5]:
                by_word[word][question.gold] += 1
    for family, chance in CHANCE.items():
        total = answers[family].total()
        spread = 5 * (chance * (1 - chance) / total) ** 0.5
        assert max(answers[family].values()) / total < chance + spread, answers[family]
    for word, counts in by_word.items():
        spread = 4.5 * (0.25 / counts.total()) ** 0.5
        assert abs(counts["Yes"] / counts.total() - 0.5) < spread, (word, counts)


def test_who_reads_only_the_question_is_at_chance(asked, items):
    """The best guess after training, by question, colour and shape, on the held-out questions."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, question in asked:
        for word in ("", *question.text.split()):
            seen[question.family, word][question.gold] += 1
    right: Counter[str] = Counter()
    for _, question in items:
        votes: Counter[str] = Counter()
        for word in ("", *question.text.split()):
            counts = seen[question.family, word]
            for answer, count in counts.items():
                votes[answer] += count / counts.total()  # pyright: ignore
        right[question.family] += max(votes, key=lambda answer: votes[answer]) == question.gold
    for family, chance in CHANCE.items():
        assert right[family] / 80 == pytest.approx(chance, abs=4 * (chance / 80) ** 0.5), family


def test_held_out_questions_are_about_held_out_compositions(items):
    held_out = {" ".join(pair) for pair in HELD_OUT}
    for scene, question in items:
        assert {thing.name for thing in scene.things} <= held_out
        assert set(question.options) <= held_out
        if question.family == "existence":
            assert any(name in question.text for name in held_out)


def test_held_out_answers_are_exactly_balanced(items):
    for family, answers in ANSWERS.items():
        counts = Counter(q.gold for _, q in items if q.family == family)
        assert set(counts.values()) == {80 // len(answers)}
        assert set(counts) == set(answers)


def test_each_image_of_existence_is_asked_twice(items):
    groups: dict[str, list[tuple[Scene, Question]]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[group_of(index)].append(item)
    for name, members in groups.items():
        if not name.startswith("existence"):
            assert len(members) == 1
            continue
        (one, first), (two, second) = members
        assert one == two
        assert {first.gold, second.gold} == {"Yes", "No"}


@pytest.mark.parametrize("changes", [{"split": "train"}, {"content": "captions"}])
def test_other_worlds_have_no_held_out_questions(changes):
    with pytest.raises(ConfigError, match="split 'eval' and content 'instruct'"):
        next(iter(eval_items(HELD.replace(**changes))))


def test_questions_become_parquet(tmp_path: Path):
    path = write_questions(HELD, str(tmp_path / "questions.parquet"))
    rows = pq.read_table(path).to_pylist()
    assert rows == list(eval_items(HELD))
    assert len({row["item_id"] for row in rows}) == len(rows) == 140
    assert Counter(row["family"] for row in rows) == dict.fromkeys(FAMILIES, 20)
    assert all(Image.open(io.BytesIO(row["image"])).size == (32, 32) for row in rows)
    assert rows[4]["prompt"].split("\n")[1] == f"A. {rows[4]['options'][0]}"
    assert [path.name for path in tmp_path.iterdir()] == ["questions.parquet"]


def test_tars_and_json_hold_the_same_conversations(tmp_path: Path):
    path = Path(write_instruct_json(TALK, str(tmp_path / "llava")))
    listed = {record["id"]: record for record in json.loads(path.read_text())}
    assert len(listed) == 40
    packed: dict[str, dict[str, bytes]] = defaultdict(dict)
    for shard in write_world(TALK, str(tmp_path / "tars"), processes=1):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                packed[key][suffix] = tar.extractfile(member).read()  # pyright: ignore
    assert list(packed) == list(listed), "rows are in the same order"
    for key, files in packed.items():
        record = json.loads(files["json"])
        assert listed[key].items() <= record.items()
        assert (record["modality"] == "image") == ("jpg" in files) == ("image" in record)
        assert "txt" not in files
        if "jpg" in files:
            image = path.parent / "images" / record["image"]
            assert image.read_bytes() == files["jpg"]
    assert {len(files) for files in packed.values()} == {1, 2}


def test_captions_alone_are_no_conversations(tmp_path: Path):
    with pytest.raises(ConfigError, match="no conversations"):
        write_instruct_json(PAIRS, str(tmp_path))


def test_shipped_tokenizer_is_what_the_maker_makes():
    for name, text in vocabulary.language_files().items():
        shipped = vocabulary.DIRECTORY / "mini_lm" / name
        assert shipped.read_text(encoding="utf-8") == text


def test_words_of_the_world_are_one_token_each(talks):
    ours = tokenizer()
    said = {" " + turn["value"] for talk in talks for turn in talk.turns}
    words = {word for text in said for word in re.findall(r" ?[^\W\d_]+", text.replace(IMAGE, ""))}
    assert len(words) > 150
    assert [word for word in words if len(ours(word).input_ids) > 1] == []
    assert len(ours(vocabulary.SYSTEM + " ").input_ids) == 30


def test_tokenizer_has_a_real_ones_special_tokens():
    ours = tokenizer()
    assert ours.convert_tokens_to_ids(["<|endoftext|>", IMAGE]) == [END_ID, IMAGE_ID]
    assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (END_ID, END_ID, None)
    assert ours.padding_side == "right"
    ids = ours(f"USER: {IMAGE}\nHow many? ASSISTANT: 3<|endoftext|>USER:").input_ids
    tokens = ours.convert_ids_to_tokens(ids)
    assert tokens.count(IMAGE) == 1
    assert tokens[-5:] == ["Ġ", "3", "<|endoftext|>", "USER", ":"], "a number's space stands alone"


@pytest.mark.parametrize("family", ["qwen2", "llama", "llava"])
def test_tokenizer_is_the_same_beside_a_model(tmp_path: Path, family: str):
    ours = tokenizer()
    text = f"{vocabulary.SYSTEM} USER: {IMAGE}\nIs there a zébra,  12\n\n(or more)? ASSISTANT: Yes"
    spec = catalog_mini.MINI_LANGUAGE_MODELS["qwen2_0_5b"].llm.config
    assert spec is not None
    text_config = AutoConfig.for_model(**spec)
    configs = {"llama": {**spec, "model_type": "llama"}, "qwen2": spec}
    config = (
        LlavaConfig(text_config=text_config)
        if family == "llava"
        else AutoConfig.for_model(**configs[family])
    )
    config.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for other in (again, pickle.loads(pickle.dumps(ours))):
        assert other(text).input_ids == ours(text).input_ids
        assert other.decode(other(text).input_ids) == text


@pytest.mark.parametrize("role", catalog_mini.MINI_LANGUAGE_MODELS)
def test_language_models_are_what_the_catalogue_says(role: str):
    spec = catalog_mini.MINI_LANGUAGE_MODELS[role].llm
    config = AutoConfig.for_model(**(spec.config or {}))
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (config.hidden_size, config.max_position_embeddings) == (
        spec.hidden,
        spec.context_length,
    )
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(spec.mparams, abs=5e-4)
    assert len(tokenizer()) <= config.vocab_size
    assert config.vocab_size % 64 == 0
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer()("USER: Hi").input_ids])).logits
    assert bool(logits.isfinite().all())


def test_every_role_of_the_vlm_recipes_has_a_miniature():
    assert set(catalog_mini.MINI_LANGUAGE_MODELS) == set(catalog.LANGUAGE_MODELS)
    for stages in VLM_RECIPES.values():
        for settings, content in zip(stages, ("pretrain", "instruct"), strict=True):
            world = catalog_mini.MINI_DATA[settings["data"]].mini
            assert world is not None
            assert world.content == content
    eval_item(catalog_mini.MINI_QUESTIONS["scenes"].mini, 0)
