"""The 16 benchmarks: prompts, golds, malformed files, and the miniature world's own files."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_rows import PICTURE, RED, WORKED, encoded, write
from PIL import Image

from kdscale.core.config import MiniWorld
from kdscale.core.types import (
    BadBenchmark,
    ConfigError,
    DataError,
    MissingBenchmark,
    UnknownName,
)
from kdscale.eval import score
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.images import StoredImage, read_images
from kdscale.eval.matching import is_right
from kdscale.eval.prompts import LETTER, LETTERS, WORD
from kdscale.eval.questions import Question
from kdscale.eval.sources import hub_commit, questions
from kdscale.mini.benchmark_schemas import SCHEMAS
from kdscale.mini.benchmarks import write_benchmarks
from kdscale.mini.scenes import COLOURS, HELD_OUT, SHAPES

N = 96
WORLD = MiniWorld(split="eval", content="instruct", seed=98, image_px=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All miniature benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(root, WORLD, N)
    return root


@pytest.fixture(scope="module")
def asked(folder: Path) -> dict[str, list[Question]]:
    """What they ask."""
    return {name: questions(name, folder) for name in BENCHMARKS}


@pytest.fixture(scope="module")
def pictures(asked: dict[str, list[Question]]) -> dict[Any, bytes]:
    """The images that they show."""
    return read_images(stored(q for found in asked.values() for q in found))


def stored(asked: Iterable[Question]) -> list[StoredImage]:
    """Where the images of questions are."""
    return [q.image for q in asked if isinstance(q.image, StoredImage)]


def test_the_table_is_the_papers():
    columns = (
        "mme_p mmbench seedbench gqa scienceqa mmmu mathvista ai2d chartqa ocrbench textvqa docvqa "
        "mmvp realworldqa cvbench_2d cvbench_3d"
    )
    assert list(BENCHMARKS) == columns.split()
    assert all(name == spec.name for name, spec in BENCHMARKS.items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_worked_examples(tmp_path: Path, name: str):
    _, prompt, gold, options = WORKED[name]
    found = questions(name, write(tmp_path, name), mode="corrected" if name == "mmmu" else "paper")
    first = found[0]
    assert len(found) == (BENCHMARKS[name].group_size or 1)
    assert (first.prompt, first.gold, first.options) == (prompt, gold, options)
    assert first.max_new_tokens == {"mme_p": 32, "gqa": 128, "chartqa": 128, "docvqa": 128}.get(
        name, 512
    )
    assert [*read_images(stored([first])).values()] == ([] if name == "scienceqa" else [RED])
    assert first.image_sha256 == (hashlib.sha256(RED).hexdigest() if first.image else "")


def test_labels_and_groups(tmp_path: Path):
    found = {name: questions(name, write(tmp_path, name), mode="corrected")[0] for name in WORKED}
    told = {name: (q.question_type, q.category, q.group) for name, q in found.items()}
    assert told["mme_p"] == ("", "color", "color/1.png")
    assert told["mmbench"] == ("", "sense", "241")
    assert told["seedbench"] == ("", "5", "")
    assert told["scienceqa"] == ("text", "grade3", "")
    assert told["mmmu"] == ("multiple-choice", "Art Theory", "")
    assert told["mathvista"] == ("multi_choice", "general-vqa", "")
    assert told["ocrbench"] == ("Regular Text Recognition", "IIIT5K", "")
    assert told["docvqa"] == ("form, layout", "", "")
    assert told["mmvp"] == ("", "", "49")
    assert told["cvbench_2d"] == ("Count", "COCO", "")


def test_what_the_modes_change(tmp_path: Path):
    write(tmp_path, "mmmu")
    paper = questions("mmmu", tmp_path)[0]
    corrected = questions("mmmu", tmp_path, mode="corrected")[0]
    assert corrected.prompt == WORKED["mmmu"][1]
    assert paper.prompt == f' Who painted it? Options:\nA. Goya\nB. Keeffe", \n{LETTER}'
    assert (paper.gold, paper.options) == (corrected.gold, corrected.options)
    write(tmp_path, "mmvp")
    assert [q.gold for q in questions("mmvp", tmp_path)] == ["A", "A"]
    assert [q.gold for q in questions("mmvp", tmp_path, mode="corrected")] == ["B", "A"]


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        ("12", ("12",)),
        ("['24/7', '3.429']", ("24/7", "3.429")),
        ("['24/7','3.429']", ("24/7", "3.429")),
        ("[5, 7]", ("5", "7")),
        ("[0, 1)", ("[0, 1)",)),
    ],
)
def test_open_answers_of_mmmu(tmp_path: Path, answer: str, golds: tuple[str, ...]):
    changes = {"question_type": "open", "answer": answer, "options": "[]"}
    found = questions("mmmu", write(tmp_path, "mmmu", changes))[0]
    assert found.gold == answer
    assert found.prompt == f" Who painted it?\n{WORD}"
    assert score("mmmu", [found.item(answer)]).value == 100  # the reference compares the text
    assert all(score("mmmu", [found.item(gold)], "corrected").value == 100 for gold in golds)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_gaps_in_mmbench_keep_letters(tmp_path: Path, mode: Any):
    changes = {"A": "ice", "B": "nan", "C": "tea", "D": "nan", "answer": "C"}
    found = questions("mmbench", write(tmp_path, "mmbench", changes), mode=mode)[0]
    assert found.prompt == f"Think.\nWhich is warm? Options:\nA. ice\nC. tea\n{LETTER}"
    assert (found.gold, found.options) == ("C", ("ice", "nan", "tea"))
    assert score("mmbench", [found.item("C")], mode).value == 100
    assert score("mmbench", [found.item("B")], mode).unparsed_share == 1


def test_other_forms_of_rows(tmp_path: Path):
    free = {"question_type": "free_form", "choices": None}
    assert questions("mathvista", write(tmp_path / "a", "mathvista", free))[0].prompt.endswith(WORD)
    bare = questions("textvqa", write(tmp_path / "b", "textvqa", {"ocr_tokens": []}))[0]
    assert bare.prompt == f"what brand?\nReference OCR tokens:\n{WORD}"
    plain = questions("mmbench", write(tmp_path / "c", "mmbench", {"hint": "nan"}))[0]
    assert plain.prompt.startswith("Which is warm? Options:")
    seen = questions(
        "scienceqa", write(tmp_path / "d", "scienceqa", {"image": PICTURE, "hint": ""})
    )
    assert [*read_images(stored(seen)).values()] == [RED]
    assert seen[0].prompt.startswith("Which")
    two = questions("realworldqa", write(tmp_path / "e", "realworldqa", {"answer": "Right"}))[0]
    assert (two.options, two.question_type) == ((), "open")


NO_IMAGE = {"image": None}
MALFORMED = [
    ("mme_p", {"answer": "maybe"}, "neither Yes nor No"),
    ("mme_p", NO_IMAGE, "image is missing"),
    ("mmbench", {"answer": "C"}, "none of the 2 options"),
    ("mmbench", {"index": None}, "index is None"),
    ("mmbench", {"A": "nan", "answer": "A"}, "not there"),
    ("seedbench", {"image": []}, "image is missing"),
    ("seedbench", {"choice_b": None}, "choice_a to choice_d"),
    ("gqa", {"imageId": "n2"}, "image is missing"),
    ("gqa", {"answer": ""}, "answer is missing or empty"),
    ("scienceqa", {"answer": 3}, "none of the 3 options"),
    ("scienceqa", {"choices": []}, "choices is no list"),
    ("mmmu", {"options": "Goya"}, "options is no list"),
    ("mmmu", {"answer": "F"}, "none of the 3 options"),
    ("mmmu", {"question_type": "essay"}, "question_type is 'essay'"),
    ("mathvista", {"answer": "5"}, "none of the choices"),
    ("mathvista", {"decoded_image": {"bytes": b"", "path": "a"}}, "decoded_image is missing"),
    ("ai2d", {"answer": "2"}, "none of the 2 options"),
    ("ai2d", {"answer": "b"}, "no whole number"),
    ("chartqa", {"answer": " "}, "answer is missing or empty"),
    ("chartqa", {"image": {"bytes": b"no image", "path": "a"}}, "image is no image"),
    ("ocrbench", {"answer": ["", "x"]}, "empty gold"),
    ("ocrbench", {"answer": []}, "answer is no list"),
    ("textvqa", {"answers": ["nokia"] * 9}, "not 10 golds"),
    ("docvqa", {"answers": None}, "answers is no list"),
    ("mmvp", {"Options": "Long or short"}, "not of the form"),
    ("mmvp", {"Correct Answer": "(c)"}, "none of the 2 options"),
    ("realworldqa", {"question": None}, "question is missing or empty"),
    ("cvbench_2d", {"answer": "B)C"}, "none of the 2 options"),
    ("cvbench_3d", {"answer": None}, "none of the 2 options"),
]


@pytest.mark.parametrize(("name", "changes", "said"), MALFORMED)
def test_malformed_rows_are_named(tmp_path: Path, name: str, changes: Any, said: str):
    for mode in ("paper", "corrected"):
        root = write(tmp_path / mode, name, changes)
        with pytest.raises(BadBenchmark, match=f"^{name}: .* item 0: .*{said}"):
            questions(name, root, mode=mode)


RETYPED = [
    ("gqa", "types", '{"semantic": "rel"}', "types is no struct"),
    ("mathvista", "metadata", "{}", "metadata is no struct"),
    ("docvqa", "question_types", [None], "question_types is no list of texts"),
    ("docvqa", "question_types", "form", "question_types is no list of texts"),
    ("docvqa", "answers", 5, "answers is no list of texts: 5"),
    ("textvqa", "ocr_tokens", 5.5, "ocr_tokens is no list of texts"),
    ("scienceqa", "choices", 3, "choices is no list of texts"),
    ("scienceqa", "choices", ["", " "], "choices are all blank"),
    ("scienceqa", "answer", 1.5, "answer is 1.5, no whole number"),
    ("scienceqa", "answer", True, "answer is True, no whole number"),
    ("ai2d", "options", [""], "options are all blank"),
    ("ai2d", "answer", "1.5", "answer is '1.5', no whole number"),
    ("ai2d", "answer", True, "answer is True, no whole number"),
    ("mmbench", "index", float("inf"), "index is inf, no whole number"),
    ("mmbench", "index", float("nan"), "index is nan, no whole number"),
]


@pytest.mark.parametrize(("name", "column", "value", "said"), RETYPED)
def test_columns_of_other_types_are_named(
    tmp_path: Path, name: str, column: str, value: Any, said: str
):
    root = write(tmp_path, name)
    file = root / name / BENCHMARKS[name].files.replace("*", "00000-of-00001")
    table = pq.read_table(file)
    if column in table.column_names:
        table = table.drop_columns([column])
    pq.write_table(table.append_column(column, [[value] * len(table)]), file)
    with pytest.raises(BadBenchmark, match=f"^{name}: .* item 0: .*{re.escape(said)}"):
        questions(name, root)


def test_all_bad_rows_are_found_at_once(tmp_path: Path):
    root = write(tmp_path, "chartqa", NO_IMAGE, copies=12)
    with pytest.raises(BadBenchmark, match=r"12 rows .* item 0: .* item 9: .* and 2 more") as error:
        questions("chartqa", root)
    assert "item 10" not in str(error.value)


def test_pairs_are_complete(tmp_path: Path):
    root = write(tmp_path, "mme_p")
    file = root / "mme_p/data/test-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), file)
    with pytest.raises(BadBenchmark, match=r"item 0: its group 'color/1.png' has 3 rows"):
        questions("mme_p", root)


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(MissingBenchmark, match="gqa: there is no directory"):
        questions("gqa", tmp_path / "none")
    with pytest.raises(MissingBenchmark, match=r"chartqa: .* holds no data/test-\*.parquet"):
        questions("chartqa", tmp_path)
    write(tmp_path, "gqa")
    (tmp_path / "gqa/testdev_balanced_images/testdev-00000-of-00001.parquet").unlink()
    with pytest.raises(MissingBenchmark, match=r"gqa: .*testdev_balanced_images"):
        questions("gqa", tmp_path)
    write(tmp_path, "mmvp")
    (tmp_path / "mmvp/MMVP Images/100.jpg").unlink()
    with pytest.raises(BadBenchmark, match=r"mmvp: .* item 1: image is missing"):
        questions("mmvp", tmp_path)
    write(tmp_path, "ai2d")
    data = tmp_path / "ai2d/data"
    (data / "test-00000-of-00001.parquet").rename(data / "test-00001-of-00002.parquet")
    with pytest.raises(MissingBenchmark, match="holds 1 of the 2 files"):
        questions("ai2d", tmp_path)


def test_files_that_hold_something_else(tmp_path: Path):
    file = tmp_path / "ai2d/rows.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"question": ["Why?"], "image": [RED]}), file)
    with pytest.raises(BadBenchmark, match="lacks the columns options, answer; it has question"):
        questions("ai2d", tmp_path)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(BadBenchmark, match="cannot be read"):
        questions("ai2d", tmp_path)
    pq.write_table(pa.Table.from_pylist([], schema=SCHEMAS["ai2d"]), file)
    with pytest.raises(BadBenchmark, match="no question"):
        questions("ai2d", tmp_path)
    lines = tmp_path / "mmvp/Questions.csv"
    lines.parent.mkdir()
    lines.write_bytes("Index,Question\n1,caf\xe9\n".encode("latin-1"))
    with pytest.raises(BadBenchmark, match=r"mmvp: .*Questions\.csv"):
        questions("mmvp", tmp_path)


def test_what_is_asked_for_must_make_sense(folder: Path):
    with pytest.raises(UnknownName, match="Did you mean gqa"):
        questions("gqqa", folder)
    with pytest.raises(UnknownName, match="mode 'papr'"):
        questions("gqa", folder, mode="papr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="limit is 0"):
        questions("gqa", folder, limit=0)
    with pytest.raises(ConfigError, match="multiple of 8"):
        write_benchmarks(folder, WORLD, 12)
    with pytest.raises(ConfigError, match="split 'eval'"):
        write_benchmarks(folder, WORLD.replace(split="train"))


def test_images_are_read_where_they_are_and_checked(tmp_path: Path):
    """Rows in several files and row groups, asked for in any order; a changed file is named."""
    folder = tmp_path / "chartqa"
    folder.mkdir()
    images = [encoded((n, 0, 0)) for n in range(90)]
    rows = [WORKED["chartqa"][0] | {"image": {"bytes": data, "path": None}} for data in images]
    for part in range(2):
        table = pa.Table.from_pylist(rows[45 * part : 45 * part + 45], SCHEMAS["chartqa"])
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=20)
    found = stored(questions("chartqa", tmp_path))
    for chosen in (range(90), (89, 3, 44, 45, 46), (7,), ()):
        read = read_images(found[n] for n in chosen)
        assert [read[found[n]] for n in chosen] == [images[n] for n in chosen]
    pq.write_table(table.slice(1), folder / "part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet has changed"):
        read_images([found[50]])
    with pytest.raises(DataError, match=r"part-1\.parquet has changed"):
        read_images([found[89]])
    (folder / "part-0.parquet").unlink()
    with pytest.raises(DataError, match=r"part-0\.parquet cannot be read any more"):
        read_images(found[:1])


def test_questions_hold_no_images(tmp_path: Path):
    """However many images there are, a few of them are in memory at once."""
    data = RED + bytes(200_000)
    rows = [WORKED["chartqa"][0] | {"image": {"bytes": data, "path": None}}] * 300
    (folder := tmp_path / "chartqa").mkdir()
    table = pa.Table.from_pylist(rows, SCHEMAS["chartqa"])
    pq.write_table(table, folder / "rows.parquet", row_group_size=50, use_dictionary=False)
    del table
    arrow = pa.default_memory_pool()
    before, earlier_peak = arrow.bytes_allocated(), arrow.max_memory()
    tracemalloc.start()
    asked = questions("chartqa", tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(asked) == 300
    assert kept < 3e6
    assert peak < 80 * len(data)  # 60 MB are in the file
    assert arrow.max_memory() < max(earlier_peak + 1, before + 150 * len(data))


def test_folders_are_found_in_either_layout(folder: Path, asked: Any, tmp_path: Path):
    assert questions("ai2d", folder / "ai2d") == asked["ai2d"]
    flat = tmp_path / "ai2d"
    flat.mkdir()
    whole = pq.read_table(folder / "ai2d/data")
    pq.write_table(whole.slice(0, 50), flat / "part-0.parquet")
    pq.write_table(whole.slice(50), flat / "part-1.parquet")
    assert questions("ai2d", tmp_path) == asked["ai2d"]


def test_a_revision_is_pinned_to_its_commit(folder: Path, tmp_path: Path, monkeypatch: Any):
    commit = "0123456789abcdef" * 2 + "01234567"
    cache = tmp_path / "datasets--lmms-lab--GQA" / "snapshots" / commit
    cache.parent.mkdir(parents=True)
    cache.symlink_to(folder / "gqa")
    wanted: list[str] = []

    def fetch(repo: str, **options: Any) -> str:
        wanted.append(options["revision"])
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub_commit("gqa") == hub_commit("gqa", "v2") == commit
    assert questions("gqa", revision=commit)[0].benchmark == "gqa"
    assert wanted == ["main", "v2", commit]


def test_the_hub_is_asked_only_without_a_directory(folder: Path, monkeypatch: Any, asked: Any):
    calls: list[Any] = []

    def fetch(repo: str, **options: Any) -> str:
        calls.append((repo, options["repo_type"], options["revision"], options["allow_patterns"]))
        if repo != "lmms-lab/GQA":
            raise ConnectionError("no route\nto the hub")
        return str(folder / "gqa")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert questions("gqa") == asked["gqa"]
    assert hub_commit("gqa", "v1.0") == "v1.0"  # that folder is no cache of the hub's
    calls.pop()
    patterns = ["testdev_balanced_instructions/testdev-*.parquet"]
    patterns.append("testdev_balanced_images/testdev-*.parquet")
    assert calls == [("lmms-lab/GQA", "dataset", "main", patterns)]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(MissingBenchmark, match=r"fetched .*ConnectionError: no route\); give"):
        questions("chartqa")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingBenchmark, match="HF_HUB_OFFLINE is set"):
        questions("chartqa")


@pytest.mark.parametrize(
    ("name", "limit", "ids"),
    [
        ("chartqa", 3, [0, 1, 2]),
        ("seedbench", 2, [2, 3]),
        ("mme_p", 3, [0, 1, 2, 3]),
        ("mmvp", 1, [0, 1]),
        ("mmbench", 5, [0, 1, 24, 25, 48, 49, 72, 73]),
        ("gqa", 500, list(range(N))),
    ],
)
def test_limits_keep_groups_whole(folder: Path, name: str, limit: int, ids: list[int]):
    assert [int(q.item_id) for q in questions(name, folder, limit)] == ids


def test_every_miniature_benchmark_can_be_asked(
    asked: dict[str, list[Question]], pictures: dict[Any, bytes]
):
    for name, found in asked.items():
        spec = BENCHMARKS[name]
        assert len(found) == len({q.item_id for q in found}) == N
        for q in found:
            assert q.benchmark == name
            assert q.prompt.endswith((spec.suffix or "", spec.open_suffix or "\0"))
            assert (q.image is None) == (q.question_type == "text")
            if q.image is not None:
                assert Image.open(io.BytesIO(pictures[q.image])).size == (64, 64)
            if q.options and name != "realworldqa":
                assert all(option in q.prompt for option in q.options)
    assert len({q.category for q in asked["mme_p"]}) == 14


def test_a_model_that_knows_the_golds_is_right(asked: dict[str, list[Question]]):
    for found in asked.values():
        for q in found:
            golds = (q.gold,) if isinstance(q.gold, str) else q.gold
            assert any(is_right(golds[0], gold) for gold in golds)
            right = q.options if q.benchmark == "mathvista" else LETTERS[: len(q.options)]
            assert not q.options or q.gold in right


def test_nobody_gains_by_a_constant_answer(asked: dict[str, list[Question]]):
    for found in asked.values():
        by_text: dict[Any, Counter[str]] = {}
        for q in found:
            kind = len(q.options) or q.prompt
            gold = q.gold if isinstance(q.gold, str) else q.gold[0]
            by_text.setdefault(kind, Counter())[gold] += 1
        for kind, golds in by_text.items():
            chance = 1 / kind if isinstance(kind, int) else 1 / max(2, len(golds))
            if sum(golds.values()) >= 8:
                assert max(golds.values()) / sum(golds.values()) <= chance + 0.13, (kind, golds)
    for q in (pairs := asked["mme_p"])[::2]:
        other = pairs[int(q.item_id) + 1]
        assert {str(q.gold), str(other.gold)} == {"Yes", "No"}
        assert q.image == other.image


def test_questions_name_only_held_out_things(asked: dict[str, list[Question]]):
    thing = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    named = {pair for found in asked.values() for q in found for pair in thing.findall(q.prompt)}
    assert len(named) > 30
    assert named <= set(HELD_OUT)


def nearest_colours(image: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The palette's nearest colour to each pixel, and its distance."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=float)
    palette = np.array(list(COLOURS.values()), dtype=float)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    return distance.argmin(-1), distance.min(-1)


def test_answers_can_be_read_off_the_images(
    asked: dict[str, list[Question]], pictures: dict[Any, bytes]
):
    names, seen = list(COLOURS), Counter()
    for found in asked.values():
        for q in found:
            kind = re.search(r"What colour is the (sign|tallest bar)\?", q.prompt)
            if q.image is None or kind is None:
                continue
            gold = q.gold if isinstance(q.gold, str) else q.gold[0]
            if q.options and gold in LETTERS:
                gold = q.options[LETTERS.index(gold)]
            nearest, distance = nearest_colours(pictures[q.image])
            if kind[1] == "sign":
                shown = np.bincount(nearest[18:22, 6:58].ravel()).argmax()
            else:
                top = int(np.flatnonzero((distance < 60).sum(1) >= 5)[0]) + 3
                shown = np.bincount(nearest[top][distance[top] < 60]).argmax()
            seen[kind[1]] += 1
            assert names[shown] == gold, q.prompt
    assert min(seen.values()) > 40


def test_files_depend_on_the_world_alone(tmp_path: Path):
    digests = []
    for place, seed in enumerate((98, 98, 99)):
        root = tmp_path / str(place)
        write_benchmarks(root, WORLD.replace(seed=seed, image_px=16), 32)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        names = [str(path.relative_to(root)) for path in files]
        digests.append({n: f.read_bytes() for n, f in zip(names, files, strict=True)})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 16 + 1 + 32
    assert sum(digests[0][name] == digests[2][name] for name in digests[0]) == 0


def test_mini_files_have_the_originals_types(folder: Path):
    table = pq.read_table(folder / "mmmu/data").to_pylist()
    assert all(isinstance(ast.literal_eval(row["options"]), list) for row in table)
    assert all(row["image_2"] is None for row in table)
    header = (folder / "mmvp/Questions.csv").read_text().splitlines()[0]
    assert header == "lndex,Question,Options,Correct Answer"
    assert pq.read_schema(folder / "cvbench_3d/test_3d.parquet").names[:2] == ["idx", "type"]
