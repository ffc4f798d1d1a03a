"""`kdscale export`: stages by their keys, and what other programs make of the directories."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_vlm_stage import SMALL, attempt, jobs
from typer.testing import CliRunner, Result
from worlds import small_job

from kdscale.cli import app
from kdscale.core.catalog_mini import MINI_LANGUAGE_MODELS, MINI_STUDENTS
from kdscale.core.config import DataSpec, MiniWorld
from kdscale.core.storage import StageStore, Storage
from kdscale.data.samples import decode
from kdscale.data.shards import Manifest
from kdscale.eval.generate import Generator, Prompt
from kdscale.mini.questions import eval_items
from kdscale.models.vlm import load_vlm
from kdscale.stages.inputs import find_source
from kdscale.stages.jobs import VlmJob
from kdscale.stages.loop import World
from kdscale.stages.run import Run

DISTILL, TEACHER, OTHER = "1234567812345678", "56785678aaaaaaaa", "1299999999999999"

# What the report prints, where kdscale cannot be imported.
PIPELINE = """
import json, sys
sys.modules["kdscale"] = None
code, questions, new_tokens = sys.argv[1:]
exec(code)
found = []
for question in json.load(open(questions)):
    parts = [{"type": "image", "path": path} for path in question["images"]]
    parts.append({"type": "text", "text": question["prompt"]})
    (said,) = ask(
        text=[{"role": "user", "content": parts}],
        return_full_text=False,
        max_new_tokens=int(new_tokens),
    )
    found.append(said["generated_text"])
print(json.dumps(found))
"""


def export(storage: Path, *command: object) -> Result:
    options = ["export", *command, "--storage", storage]
    return CliRunner().invoke(app, list(map(str, options)), env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of several kinds; those of towers are written by their own function."""
    root = tmp_path_factory.mktemp("stages")
    for kind, key, seed in (("distill", DISTILL, 3), ("teacher", TEACHER, 4)):
        fields: dict[str, Any] = {"student": MINI_STUDENTS["vit_t16"], "teacher": None}
        job = small_job(str(root), total_steps=0, loss="clip", seed=seed, **fields)
        Run(replace(job, kind=kind, key=key), World(), lambda _: None).train(lambda _: iter(()))
    store = Storage(str(root))
    store.write(b"{}", "stages", "distill", OTHER, "journal", "0.jsonl")
    asked = {"recipe": {"model": "stage:finetune/" + "f" * 16}}
    StageStore(store, "evaluate", "e" * 16).finish(asked)
    StageStore(store, "pretrain", "d" * 16).finish({})
    return root


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("77", "--to", "hf"), "UnknownStage: no stage in ROOT has a key that begins with 77; no"),
        (("77", "--to", "open_clip"), f"finished there: distill {DISTILL}, teacher {TEACHER}"),
        (("12", "--to", "open_clip"), f"AmbiguousStage: 12 may be distill {DISTILL}, distill 1299"),
        (("129", "--to", "open_clip"), f"UnfinishedStage: distill {OTHER} in ROOT is not finished"),
        (("123", "--to", "hf"), f"--to hf takes a finetune stage, and 123 is distill {DISTILL}"),
        (("ee", "--to", "hf"), f"evaluate {'e' * 16}, which asked finetune {'f' * 16}"),
        (("dd", "--to", "hf"), "holds a projector alone"),
        ((DISTILL, "--to", "open_clip", "--out", "FULL"), "FolderTaken: "),
        ((DISTILL, "--to", "onnx"), "'onnx' is not one of 'hf', 'open_clip'"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named(
    command: tuple[str, ...], message: str, storage: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("stays")
    given = [str(full) if part == "FULL" else part for part in command]
    found = export(storage, *given, *([] if "FULL" in command else ["--out", tmp_path / "out"]))
    assert found.exit_code == 2
    assert message.replace("ROOT", str(storage)) in found.output
    assert not (tmp_path / "out").exists()
    assert [file.name for file in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("key", [DISTILL[:3], TEACHER])
def test_towers_go_to_open_clip(key: str, storage: Path, tmp_path: Path) -> None:
    found = export(storage, key, "--to", "open_clip", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    kind, whole = ("teacher", key) if key == TEACHER else ("distill", DISTILL)
    assert f"{kind} {whole}" in found.output
    assert f"path = {str(tmp_path / 'out')!r}" in found.output
    assert "read_spec(path)" in found.output  # the miniature vocabulary is kdscale's own
    name = "open_clip_model.safetensors"
    ours = load_file(storage / "stages" / kind / whole / "output" / "model" / name)
    theirs = load_file(tmp_path / "out" / name)
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[n] == theirs[n]).all()) for n in ours)


def test_the_report_as_json(storage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = export(storage, TEACHER, "--to", "open_clip", "--out", out, "--json")
    document = json.loads(found.stdout)
    assert document["key"] == TEACHER
    assert document["max_difference"] <= document["tolerance"]
    scope: dict[str, Any] = {}
    exec(document["code"], scope)  # what the report says next
    assert scope["tokenizer"](["a red circle"]).shape == (1, 24)
    assert scope["model"].visual is not None


def drawn(content: str, root: Path) -> Manifest:
    """Conversations of a small miniature world."""
    world: Any = MiniWorld(content=content, num_samples=24, samples_per_shard=24)  # type: ignore[arg-type]
    source = find_source(
        DataSpec(name=content, mini=world), Storage(str(root)), content="conversations"
    )
    return source.manifest()


def mini_vlm(root: Path, tower: str) -> VlmJob:
    """Trains both stages of a miniature VLM for some steps; returns the second one's job."""
    store = root / "store"
    data = drawn("pretrain", store), drawn("instruct", store)
    made = jobs(root, "tinyllava", ("vit_t16", "qwen2_0_5b"), data)
    fields = {
        "vision": MINI_STUDENTS[tower],
        "llm": MINI_LANGUAGE_MODELS["qwen2_0_5b"].llm,
        "lr": 2e-3,
        **SMALL,
        "length_grouping": False,
    }
    pretrain, finetune = (replace(job, recipe=job.recipe.replace(**fields)) for job in made)
    attempt(pretrain)
    finetune = replace(finetune, total_steps=6)
    attempt(finetune)
    return finetune


@pytest.mark.parity
def test_an_exported_vlm_answers_in_plain_transformers(tmp_path: Path) -> None:
    """Through the pipeline that the report prints, with and without images."""
    job, out = mini_vlm(tmp_path, "vit_t16"), tmp_path / "out"
    found = export(tmp_path / "store", job.key[:4], "--to", "hf", "--out", out, "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["extra_import"] is None
    world = MiniWorld(split="eval", content="instruct", num_samples=8)
    asked: list[Prompt] = []
    questions: list[dict[str, Any]] = []
    for number, item in enumerate(eval_items(world)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(item["image"])
        for image in (item["image"], None):
            images = (image,) if image else ()
            asked.append(Prompt(name="", text=item["prompt"], images=images, max_new_tokens=8))
            questions.append({"prompt": item["prompt"], "images": [str(path)] if image else []})
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, report["code"], str(tmp_path / "questions.json"), "8"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    with job.stage.storage.local_directory(*job.stage.parts, "output", "model") as directory:
        generator = Generator(*load_vlm(directory), decode)
    ours = [answer.text for answer in generator(asked)]
    assert [text.strip() for text in theirs] == ours
    assert len(set(ours)) > 2  # the same answer to everything would prove little


@pytest.mark.slow
def test_a_hierarchical_vlm_needs_one_import(tmp_path: Path) -> None:
    job = mini_vlm(tmp_path, "convnext_t")
    found = export(tmp_path / "store", job.key, "--to", "hf", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "one import" in found.output
    assert "import kdscale.models.token_timm  # registers the tower's class" in found.output
