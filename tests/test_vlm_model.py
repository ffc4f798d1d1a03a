"""Vision-language models: towers converted, parts joined, exactly the right parameters trained."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from vlm_parts import CHAT, LANGUAGES, TOWERS, batch, language, tower

from kdscale.core.catalog import LANGUAGE_MODELS, STUDENTS, TEACHERS
from kdscale.core.config import TowerSpec
from kdscale.core.scale import PAPER, TRUE_SIZE_CPU, language_model
from kdscale.core.types import ConfigError, WeightsError
from kdscale.core.vlm_config import Finetune, LanguageModelSpec, Lora, Pretrain, VlmStage
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.models import language as language_module
from kdscale.models import vlm
from kdscale.models.hf_towers import (
    family,
    feature_rule,
    image_processor,
    num_image_tokens,
    stride_px,
    vision_model,
)
from kdscale.models.language import load_language, load_tokenizer
from kdscale.models.preprocess import eval_crop, normalise
from kdscale.models.towers import build_clip, image_features

transformers.utils.logging.disable_progress_bar()
ALL = STUDENTS | TEACHERS
SMALL_LORA = Lora(rank=4, alpha=8)


@cache
def small_clip(name: str) -> Any:
    """A small pair, frozen; only read."""
    return build_clip(tower(name), seed=1).eval().requires_grad_(False)


def stages(name: str, spec: TowerSpec, llm: LanguageModelSpec) -> list[VlmStage]:
    """Both stages of a recipe, with small adapters."""
    pretrain, finetune = VLM_RECIPES[name]
    if finetune.get("lora"):
        finetune = finetune | {"lora": SMALL_LORA}
    return [
        Pretrain(vision=spec, llm=llm, **pretrain),
        Finetune(vision=spec, llm=llm, **finetune),
    ]


def build(
    tower_name: str, language_name: str, folder: Path, **fields: Any
) -> tuple[Any, Any, TowerSpec, VlmStage]:
    """A small model and its processor."""
    options = {name: fields.pop(name) for name in ("dtype",) if name in fields}
    spec, llm = tower(tower_name), language(language_name, folder)
    recipe = Finetune(**({"vision": spec, "llm": llm, "data": "llava_mix_665k"} | fields))
    model, tokenizer = load_language(llm, seed=2, **options)
    vision = vision_model(small_clip(tower_name), spec, recipe.hierarchical_tokens)
    joined = vlm.build_vlm(vision, model, tokenizer, recipe, spec, chat_template=CHAT)
    return joined[0].eval(), joined[1], spec, recipe


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def train(model: Any, recipe: VlmStage, inputs: dict[str, torch.Tensor], steps: int = 2) -> None:
    """Takes steps large enough that every trained tensor must move."""
    groups = vlm.parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW([group | {"lr": 1e-2} for group in groups])
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("tower_name", "language_name"),
    [
        # One tower with every language model, and every tower with one, each time; all at night.
        pytest.param(t, m, marks=() if t == "vit_t16" or m == LANGUAGES[0] else pytest.mark.slow)
        for t in TOWERS
        for m in LANGUAGES
    ],
)
def test_both_recipes_train_what_they_say(
    tower_name: str, language_name: str, tmp_path: Path
) -> None:
    """Four stages in a row; then save, read with plain transformers, and generate."""
    model, processor, spec, _ = build(tower_name, language_name, tmp_path)
    inputs = batch(model, spec)
    for name in ("tinyllava", "bunny"):
        for recipe in stages(name, spec, language(language_name, tmp_path)):
            vlm.prepare_training(model, recipe)
            trainable = vlm.trainable_names(model)
            assert {n.split(".")[1] for n in trainable} <= {
                "multi_modal_projector",
                *(["language_model"] if recipe.trainable != "projector" else []),
            }
            before = vlm.fingerprints(model)
            train(model, recipe, inputs)
            assert not model.model.vision_tower.training
            assert vlm.changed_parameters(before, model) == trainable
    adapted = logits(model.eval(), inputs)
    model = vlm.merge(model)
    torch.testing.assert_close(logits(model, inputs), adapted, atol=1e-5, rtol=1e-5)
    model.config.text_config.name_or_path = str(tmp_path)
    vlm.save_vlm(model, processor, tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    answers = [m.generate(**prompt, max_new_tokens=3, do_sample=False) for m in (model, again)]
    assert torch.equal(*answers)


def test_student_vit_is_bit_identical_at_true_size() -> None:
    """Pooled output and the features that the projector reads."""
    spec = STUDENTS["vit_t16"]
    clip: Any = build_clip(spec, seed=3).eval()
    model = vision_model(clip, spec)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        hidden = clip.visual._embeds(pixels)
        for block in clip.visual.transformer.resblocks[:-1]:
            hidden = block(hidden)
        assert torch.equal(found.pooler_output, image_features(clip, pixels)["pooled"])
        features = vlm.tower_features(model, pixels, feature_rule("clip"))
        assert torch.equal(features, hidden[:, 1:])
    assert features.shape == (2, 196, 192)
    assert model.config.hidden_act == "gelu"
    assert model.config.num_attention_heads == 3


@pytest.mark.parametrize("name", ["clip_b16", "siglip_so400m"])
def test_converted_vits_compute_the_same(name: str) -> None:
    spec, clip = tower(name), small_clip(name)
    model = vision_model(clip, spec)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
        expected = image_features(clip, pixels)
    torch.testing.assert_close(found.pooler_output, expected["pooled"], atol=1e-5, rtol=1e-5)
    assert model.config.hidden_act == {"clip_b16": "quick_gelu"}.get(name, "gelu_pytorch_tanh")
    if name == "siglip_so400m":
        last = clip.visual.trunk.forward_intermediates(pixels, intermediates_only=True)
        maps = [value.flatten(2).mT for value in last]
        for mine, theirs in zip(found.hidden_states[1:], maps, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mobilevit_s", "swin_t", "convnext_t"])
@pytest.mark.parametrize("tokens", ["last", "stage3"])
def test_hierarchical_tokens_are_the_trunks_maps(name: str, tokens: Any) -> None:
    spec, clip = tower(name), small_clip(name)
    model = vision_model(clip, spec, tokens)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = clip.visual.trunk.forward_intermediates(pixels, intermediates_only=True)
        found = vlm.tower_features(model, pixels, feature_rule("hierarchical"))
        expected = maps[-1 if tokens == "last" else -2].flatten(2).mT
        assert torch.equal(found, expected)
        assert torch.equal(model(found).hidden_states[-1], found)  # features pass through
        if name != "swin_t" and tokens == "last":
            whole = clip.visual.trunk.forward_features(pixels)
            assert torch.equal(found, whole.flatten(2).mT)
    assert found.shape[1:] == (num_image_tokens(spec, "all", tokens), model.config.hidden_size)
    assert model.config.patch_size == stride_px(spec, tokens)


@pytest.mark.parametrize("name", ["mobilevit_s", "swin_t", "convnext_t"])
def test_hierarchical_towers_stay_in_evaluation_mode(name: str) -> None:
    """Batch norm would move its statistics, and Swin's own drop path is 0.1."""
    model: Any = vision_model(small_clip(name), tower(name))
    pixels = torch.randn(2, 3, 64, 64)
    before = vlm.fingerprints(model)
    model.train()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert not vlm.changed_parameters(before, model)
    rates = [getattr(module, "drop_prob", 0.0) for module in model.modules()]
    assert not any(rates)


@pytest.mark.parametrize(
    ("name", "options", "tokens", "rule"),
    [
        ("siglip_so400m", {"siglip_tokens": "drop_first"}, 728, (-2, "default")),
        ("siglip_so400m", {}, 729, (-2, "full")),
        ("clip_l14", {}, 256, (-2, "default")),
        ("dfn_l14", {"siglip_tokens": "drop_first"}, 256, (-2, "default")),
        ("clip_b16", {}, 196, (-2, "default")),
        ("vit_t16", {}, 196, (-2, "default")),
        ("mobilevit_s", {}, 49, (-1, "full")),
        ("swin_t", {"hierarchical_tokens": "stage3"}, 196, (-1, "full")),
        ("convnext_t", {}, 49, (-1, "full")),
    ],
)
def test_tokens_of_the_study(name: str, options: Any, tokens: int, rule: tuple[int, str]) -> None:
    assert num_image_tokens(ALL[name], **options) == tokens
    assert feature_rule(family(ALL[name]), options.get("siglip_tokens", "all")) == rule


def check_size(name: str, mparams: float, width: int) -> None:
    """Counts a true-size vision model without memory."""
    with torch.device("meta"):
        spec = ALL[name].replace(weights="random")
        model = vision_model(build_clip(spec), spec)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(mparams, abs=0.06)
    assert model.config.hidden_size == width


@pytest.mark.parametrize(
    ("name", "mparams", "width"),
    [
        ("vit_t16", 5.52, 192),
        ("mobilevit_s", 4.94, 640),
        ("swin_t", 27.52, 768),
        ("convnext_t", 27.82, 768),
    ],
)
def test_size_of_students(name: str, mparams: float, width: int) -> None:
    check_size(name, mparams, width)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "mparams", "width"),
    [
        ("siglip_so400m", 428.2, 1152),
        ("clip_l14", 303.2, 1024),
        ("dfn_l14", 303.2, 1024),
        ("clip_b16", 85.8, 768),
    ],
)
def test_size_of_teachers(name: str, mparams: float, width: int) -> None:
    check_size(name, mparams, width)


@pytest.mark.parametrize(
    ("width", "qwen2", "smollm"),
    [
        (1152, 1_836_800, 2_029_440),
        (1024, 1_722_112, 1_906_560),
        (768, 1_492_736, 1_660_800),
        (640, 1_378_048, 1_537_920),
        (192, 976_640, 1_107_840),
    ],
)
def test_size_of_projectors(width: int, qwen2: int, smollm: int) -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": width, "num_attention_heads": 1}
    for name, expected in (("qwen2_0_5b", qwen2), ("smollm_360m", smollm)):
        config = LlavaConfig(
            vision_config=dict(vision), text_config=dict(LANGUAGE_MODELS[name].config or {})
        )
        with torch.device("meta"):
            projector = LlavaMultiModalProjector(config)
        assert sum(p.numel() for p in projector.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "base", "adapters"),
    [("qwen2_0_5b", 494_032_768, 70_385_664), ("smollm_360m", 361_821_120, 69_468_160)],
)
def test_size_of_language_models_and_adapters(
    name: str, base: int, adapters: int, tmp_path: Path
) -> None:
    """Rank 128 on every linear layer of the body; none in the tower, none on the head."""
    spec, small = tower("vit_t16"), language("qwen2_0_5b", tmp_path)
    llm = small.replace(config=LANGUAGE_MODELS[name].config)
    recipe = Finetune(
        vision=spec, llm=llm, data="bunny_695k", trainable="projector+lora", lora=Lora()
    )
    with torch.device("meta"):
        model, tokenizer = load_language(llm)
        assert sum(p.numel() for p in model.parameters()) == base
        vision = vision_model(build_clip(spec), spec)
        joined, _ = vlm.build_vlm(vision, model, tokenizer, recipe, spec, chat_template=CHAT)
        vlm.prepare_training(joined, recipe)
    found = {n: p for n, p in joined.named_parameters() if p.requires_grad and "lora_" in n}
    assert sum(p.numel() for p in found.values()) == adapters
    assert all(n.startswith("model.language_model.layers.") for n in found)
    others = vlm.trainable_names(joined) - set(found)
    assert others == {
        f"model.multi_modal_projector.{n}"
        for n, _ in joined.model.multi_modal_projector.named_parameters()
    }


def test_adapters_keep_to_the_dtype(tmp_path: Path) -> None:
    """ZeRO-3 cannot flatten mixed dtypes."""
    fields = {"trainable": "projector+lora", "lora": SMALL_LORA, "dtype": torch.bfloat16}
    model, _, spec, recipe = build("vit_t16", "qwen2_0_5b", tmp_path, **fields)
    vlm.prepare_training(model, recipe)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss = model(**batch(model, spec)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_adapters_are_decided_by_the_seed(tmp_path: Path) -> None:
    fields = {"trainable": "projector+lora", "lora": SMALL_LORA}
    found = []
    for seed in (0, 0, 1):
        model, _, _, recipe = build("vit_t16", "qwen2_0_5b", tmp_path, seed=seed, **fields)
        before = torch.get_rng_state()
        vlm.prepare_training(model, recipe)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(vlm.fingerprints(model))
    changed = {n.split(".")[1] for n in found[0] if found[0][n] != found[2][n]}
    assert found[0] == found[1]
    assert changed == {"language_model", "multi_modal_projector"}


def test_adapters_must_be_merged_before_saving(tmp_path: Path) -> None:
    fields = {"trainable": "projector+lora", "lora": SMALL_LORA}
    model, processor, _, recipe = build("vit_t16", "qwen2_0_5b", tmp_path, **fields)
    names = {name for name, _ in model.named_parameters()}
    vlm.prepare_training(model, recipe)
    with pytest.raises(ConfigError, match="merge"):
        vlm.save_vlm(model, processor, tmp_path / "saved")
    assert {name for name, _ in vlm.merge(model).named_parameters()} == names
    assert not hasattr(model, "peft_config")


def test_projector_has_its_own_learning_rate(tmp_path: Path) -> None:
    fields = {"lr": 2e-4, "projector_lr": 2e-5, "weight_decay": 0.1}
    model, _, _, recipe = build("vit_t16", "qwen2_0_5b", tmp_path, **fields)
    vlm.prepare_training(model, recipe)
    groups = vlm.parameter_groups(model, recipe)
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found[2e-5, 0.1] == found[2e-5, 0.0] == 2  # weights and biases of two layers
    assert {lr for lr, _ in found} == {2e-4, 2e-5}
    assert sum(found.values()) == len(vlm.trainable_names(model))


def test_an_image_free_batch_trains_with_a_dummy(tmp_path: Path) -> None:
    """Padding image tokens keep every worker on the same path and change no answer."""
    model, _, spec, recipe = build("mobilevit_s", "qwen2_0_5b", tmp_path)
    words = batch(model, spec, images=0)
    with pytest.raises(ValueError, match="do not match"):
        model(**words, pixel_values=torch.zeros(1, 3, 64, 64))
    count, image_id = model.config.image_seq_length, model.config.image_token_id
    fill = torch.full((1, count), image_id)
    padded = {
        "input_ids": torch.cat([words["input_ids"], fill], dim=1),
        "attention_mask": torch.cat([words["attention_mask"], fill * 0], dim=1),
        "labels": torch.cat([words["labels"], torch.full_like(fill, -100)], dim=1),
        "pixel_values": torch.zeros(1, 3, 64, 64),
    }
    plain = model(**words).loss
    torch.testing.assert_close(model(**padded).loss, plain, atol=1e-6, rtol=1e-6)
    vlm.prepare_training(model, recipe)
    model(**padded).loss.backward()
    grads = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(g is not None and not g.any() for g in grads)  # there, and 0


@pytest.mark.parametrize("name", ["clip_b16", "siglip_so400m", "mobilevit_s"])
def test_cached_features_stand_for_pixels(name: str, tmp_path: Path) -> None:
    """Bit-equal logits and gradients, also for towers of stock classes."""
    model, _, spec, recipe = build(name, "qwen2_0_5b", tmp_path)
    inputs = batch(model, spec)
    rule = feature_rule(family(spec), recipe.siglip_tokens)
    with torch.no_grad():
        features = vlm.tower_features(model.model.vision_tower, inputs["pixel_values"], rule)
    assert vlm.normalise_pixels(features, spec) is features
    cached = inputs | {"pixel_values": features}
    assert torch.equal(logits(model, cached), logits(model, inputs))
    half = inputs | {"pixel_values": features.half()}
    torch.testing.assert_close(logits(model, half), logits(model, inputs), atol=5e-4, rtol=0)
    vlm.prepare_training(model, recipe)
    grads = []
    for kwargs in (inputs, cached):
        model.zero_grad()
        model(**kwargs).loss.backward()
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["clip_b16", "mobilevit_s", "swin_t"])
def test_gradient_checkpointing_changes_no_gradient(name: str, tmp_path: Path) -> None:
    model, _, spec, recipe = build(name, "qwen2_0_5b", tmp_path)
    vlm.prepare_training(model, recipe)
    inputs = batch(model, spec)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert not model.model.vision_tower.training


@pytest.mark.parametrize("name", ["mobilevit_s", "swin_t", "convnext_t"])
def test_hierarchical_towers_compute_in_bf16(name: str, tmp_path: Path) -> None:
    model, _, spec, _ = build(name, "qwen2_0_5b", tmp_path, dtype=torch.bfloat16)
    assert model(**batch(model, spec)).loss.isfinite()


def test_projector_moves_between_stages(tmp_path: Path) -> None:
    model, *_ = build("vit_t16", "qwen2_0_5b", tmp_path, seed=0)
    other, *_ = build("vit_t16", "qwen2_0_5b", tmp_path, seed=1)
    vlm.save_projector(model, tmp_path / "projector")
    vlm.load_projector(other, tmp_path / "projector")
    assert vlm.fingerprints(other) == vlm.fingerprints(model)
    wider, *_ = build("clip_b16", "qwen2_0_5b", tmp_path)
    with pytest.raises(WeightsError, match="another tower"):
        vlm.load_projector(wider, tmp_path / "projector")
    with pytest.raises(WeightsError, match="no projector"):
        vlm.load_projector(model, tmp_path)


def test_token_tables_of_both_families(tmp_path: Path) -> None:
    """Qwen2's table has room for `<image>`; SmolLM's grows, by rows of mean value."""
    models = {name: load_language(language(name, tmp_path)) for name in LANGUAGES}
    for model, tokens in models.values():
        assert tokens.convert_tokens_to_ids("<image>") == 257
        assert tokens("a<image>\nb")["input_ids"][1] == 257
        assert tokens.pad_token_id == tokens.eos_token_id == 0
        assert model.generation_config.pad_token_id == 0
        # With a padding id, the reloaded table would withhold the end token's gradient.
        assert model.config.pad_token_id is None
        assert model.get_input_embeddings().padding_idx is None
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 320
    table = models["smollm_360m"][0].get_input_embeddings().weight
    torch.testing.assert_close(table[257:], table[:257].mean(0).expand(63, -1))
    assert models["smollm_360m"][0].lm_head.weight is table
    plain = language("qwen2_0_5b", tmp_path)
    first = vlm.fingerprints(models["qwen2_0_5b"][0])
    assert vlm.fingerprints(load_language(plain)[0]) == first
    assert vlm.fingerprints(load_language(plain, seed=1)[0]) != first


def test_end_token_learns_after_a_reload(tmp_path: Path) -> None:
    """Its row is the padding's too."""
    model, processor, spec, recipe = build("vit_t16", "smollm_360m", tmp_path)
    vlm.save_vlm(model, processor, tmp_path / "saved")
    again, _ = vlm.load_vlm(tmp_path / "saved")
    inputs = batch(model, spec)
    inputs["input_ids"][:, -4] = 0
    rows = []
    for each in (model, again):
        vlm.prepare_training(each, recipe)
        each(**inputs).loss.backward()
        rows.append(each.get_input_embeddings().weight.grad[0])
    assert torch.equal(*rows)


def test_language_models_that_cannot_be_built(tmp_path: Path) -> None:
    llm = language("qwen2_0_5b", tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(llm.replace(tokenizer=None))
    with pytest.raises(ConfigError, match="no config"):
        load_language(llm.replace(config=None))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_language(llm.replace(weights=str(tmp_path), config=None))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_tokenizer(llm.replace(tokenizer=str(tmp_path)))


def test_language_model_from_a_directory(tmp_path: Path) -> None:
    """Weights and tokenizer in the hub's layout; a spec's config would be another one."""
    llm = language("smollm_360m", tmp_path)
    model, tokens = load_language(llm)
    model.save_pretrained(tmp_path / "hub")
    tokens.save_pretrained(tmp_path / "hub")
    there = llm.replace(weights=str(tmp_path / "hub"), tokenizer=None)
    again, same = load_language(there, seed=7)
    assert vlm.fingerprints(again) == vlm.fingerprints(model)
    assert len(same) == len(tokens)


@pytest.mark.parametrize(("name", "rows"), [("qwen2_0_5b", 151_936), ("smollm_360m", 49_152)])
def test_random_weights_of_true_size(name: str, rows: int) -> None:
    """The miniature tokenizer stands in; weights from the hub keep theirs."""
    drawn, known = language_model(name, TRUE_SIZE_CPU), LANGUAGE_MODELS[name]
    assert (drawn.weights, drawn.tokenizer, drawn.config) == ("random", "mini_lm", known.config)
    with torch.device("meta"):
        model, tokens = load_language(drawn)
    table: Any = model.get_input_embeddings()
    assert table.weight.shape == (rows, known.hidden)
    assert tokens.get_vocab()["<image>"] < rows
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == known.mparams
    assert language_model(name, PAPER) == known


def test_a_saved_model_answers_greedily_whatever_its_language_model_asks_for(
    tmp_path: Path,
) -> None:
    spec = language("qwen2_0_5b", tmp_path)
    body, tokens = load_language(spec)
    body.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=5.0)
    body.save_pretrained(tmp_path / "sampling")
    tokens.save_pretrained(tmp_path / "sampling")
    place, eye = str(tmp_path / "sampling"), tower("vit_t16")
    recipe = Finetune(vision=eye, llm=spec, data="llava_mix_665k")
    vision = vision_model(small_clip("vit_t16"), eye, recipe.hierarchical_tokens)
    asks, tokens = load_language(spec.replace(weights=place, tokenizer=place, config=None))
    model, processor = vlm.build_vlm(vision, asks, tokens, recipe, eye, chat_template=CHAT)
    vlm.save_vlm(model, processor, tmp_path / "saved")
    saved = vlm.load_vlm(tmp_path / "saved")[0].generation_config
    assert not saved.do_sample
    assert saved.repetition_penalty in (None, 1.0)
    assert saved.eos_token_id == tokens.eos_token_id


def test_chat_template_replaces_the_shipped_one(tmp_path: Path) -> None:
    """Evaluation tools take the tokenizer's, so both must have it."""
    model, processor, _, _ = build("vit_t16", "qwen2_0_5b", tmp_path)
    vlm.save_vlm(model, processor, tmp_path / "saved")
    again: Any = AutoProcessor.from_pretrained(tmp_path / "saved")
    for found in (processor, again):
        assert found.chat_template == found.tokenizer.chat_template == CHAT


@pytest.mark.parametrize("name", TOWERS)
def test_processor_counts_as_the_model_does(name: str, tmp_path: Path) -> None:
    model, processor, spec, _ = build(name, "qwen2_0_5b", tmp_path)
    rgb = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    inputs = processor(images=Image.fromarray(rgb), text="<image>\nWhat?", return_tensors="pt")
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == model.config.image_seq_length == num_image_tokens(spec)
    assert logits(model, dict(inputs)).isfinite().all()
    (hook,) = processor._get_num_multimodal_tokens([(90, 120)])["num_image_tokens"]
    assert hook == count


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_t16", (60, 60, 3)),
        ("vit_t16", (80, 120, 3)),
        ("siglip_so400m", (60, 60, 3)),
        ("siglip_so400m", (200, 101, 3)),
    ],
)
def test_processor_gives_our_pixels(name: str, shape: tuple[int, ...]) -> None:
    """Centre crops of an odd surplus differ by one pixel: transformers rounds its half down."""
    spec = tower(name)
    rgb = np.random.default_rng(1).integers(0, 255, shape, np.uint8)
    found = image_processor(spec)(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
    ours = normalise(torch.from_numpy(eval_crop(rgb, spec).copy())[None], spec)
    torch.testing.assert_close(found, ours, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["vit_t16", "siglip_so400m"])
def test_pad_mode_pads_with_the_mean(name: str) -> None:
    spec = tower(name)
    rgb = np.random.default_rng(2).integers(0, 255, (40, 100, 3), np.uint8)
    square = np.empty((100, 100, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in spec.mean]
    square[30:70] = rgb
    found = image_processor(spec, "pad")(Image.fromarray(rgb), return_tensors="pt")
    ours = normalise(torch.from_numpy(eval_crop(square, spec).copy())[None], spec)
    torch.testing.assert_close(found["pixel_values"], ours, atol=2e-6, rtol=0)


def test_left_padded_answers_equal_single_ones(tmp_path: Path) -> None:
    model, processor, *_ = build("convnext_t", "smollm_360m", tmp_path)
    rgb = np.random.default_rng(3).integers(0, 255, (2, 64, 64, 3), np.uint8)
    images = [Image.fromarray(each) for each in rgb]
    texts = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nHow many of them? ASSISTANT:"]
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    both = processor(images=images, text=texts, **options)
    answers = model.generate(**both, max_new_tokens=4, do_sample=False)[:, -4:]
    for row, image, text in zip(answers, images, texts, strict=True):
        one = processor(images=image, text=text, return_tensors="pt")
        single = model.generate(**one, max_new_tokens=4, do_sample=False)
        assert torch.equal(single[0, -4:], row)


def test_fingerprints_see_buffers() -> None:
    model = torch.nn.BatchNorm1d(3)
    before = vlm.fingerprints(model)
    model(torch.randn(4, 3))
    assert vlm.changed_parameters(before, model) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_other_architectures_are_refused() -> None:
    spec = tower("vit_t16")
    config: Any = copy.deepcopy(spec.clip_config)
    config["vision_cfg"]["ls_init_value"] = 0.1
    with pytest.raises(ConfigError, match="layer scale"):
        vision_model(build_clip(spec.replace(clip_config=config)), spec)
    with pytest.raises(ConfigError, match="Linear"):
        vision_model(torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1)}), spec)
    clip = copy.deepcopy(small_clip("vit_t16"))
    clip.visual.register_buffer("extra", torch.zeros(1))
    with pytest.raises(WeightsError, match="extra"):
        vision_model(clip, spec)
    with pytest.raises(ConfigError, match="stride 32"):
        vision_model(
            small_clip("convnext_t"),
            tower("convnext_t", image_px=64).replace(
                image_px=72, clip_config=_resized(tower("convnext_t"), 72)
            ),
        )
    with pytest.raises(ConfigError, match="patch_px"):
        stride_px(tower("siglip_so400m").replace(patch_px=None))


def _resized(spec: TowerSpec, px: int) -> Any:
    """A spec's config at another image size."""
    config: Any = copy.deepcopy(spec.clip_config)
    config["vision_cfg"]["image_size"] = px
    return config


def test_attention_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = vlm.attention_for
    assert choose("sdpa", "cuda").name == "sdpa"
    found = choose("auto", "cpu", "fp32")
    assert found.name == "sdpa"
    assert "cpu" in found.reason
    assert "fp32" not in choose("auto", "cpu", "bf16").reason
    with pytest.raises(ConfigError, match="the device is cpu"):
        choose("flash_attention_2", "cpu")
    monkeypatch.setattr(language_module, "find_spec", lambda _: object())
    assert choose("auto", "cuda", "bf16").name == "flash_attention_2"
    assert choose("auto", "cuda:1", "fp32").name == "sdpa"
