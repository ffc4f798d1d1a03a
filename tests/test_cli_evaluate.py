"""`kdscale evaluate` from checks to table, and the class that lmms-eval finds."""

from __future__ import annotations

import abc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import asking
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import kdscale.eval
from kdscale.cli import app
from kdscale.cli_evaluate import _execution
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import ConfigError, DataError, UnknownName
from kdscale.eval.generate import Generator
from kdscale.eval.questions import Question
from kdscale.stages.ask import decode_any, prompts_of
from kdscale.sweep.ask import check_benchmarks
from kdscale.sweep.benchmark_outcomes import interval_of  # before benchmarks are replaced

NAMES = ("mme_p", "mmbench", "gqa", *(f"other_{number}" for number in range(13)))  # 16


@dataclass(frozen=True)
class Score:
    """Stands for `kdscale.eval.Score`."""

    value: float
    n: int
    num_groups: int
    chance: float
    constant_share: float
    unparsed_share: float
    interval: tuple[float, float]
    item_scores: tuple[float, ...]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return asking.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts small benchmarks and a simple score in place of the real ones; gives what is read."""
    found: list[str] = []

    def questions(
        benchmark: str,
        directory: str | None = None,
        limit: int | None = None,
        mode: str = "paper",
        revision: str | None = None,
    ) -> list[Question]:
        found.append(benchmark)
        assert (revision or "").startswith("c0ffee") is (directory is None)
        if directory is not None and not Path(directory, benchmark).exists():
            raise DataError(f"no files of {benchmark} in {directory}")
        asked = [replace(question, benchmark=benchmark) for question in asking.questions(5)]
        return asked[:limit]

    def score(benchmark: str, items: Sequence[dict[str, Any]], mode: str = "paper") -> Score:
        values = tuple(float(len(item["prediction"]) % 2) for item in items)
        share = 100 * sum(values) / len(values)
        constant = 0.97 if benchmark == "gqa" else 0.2
        interval = (0.0, 0.0) if benchmark == "mme_p" else (0.0, 100.0)
        share = 0.0 if benchmark == "mme_p" else share
        return Score(share, len(values), 3, 25.0, constant, 0.0, interval, values)

    modules = {
        "sources": SimpleNamespace(
            questions=questions,
            hub_commit=lambda name, revision: {None: "c0ffee"}.get(revision, f"c0ffee-{revision}"),
            commit_of=lambda path: None,
        ),
        "benchmarks": SimpleNamespace(BENCHMARKS=dict.fromkeys(NAMES)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"kdscale.eval.{name}", module)
    monkeypatch.setattr(kdscale.eval, "score", score, raising=False)
    monkeypatch.setattr(kdscale.eval, "average", lambda values: 42.0, raising=False)
    return found


def evaluate(*command: object, columns: int = 120) -> Result:
    environment = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["evaluate", *map(str, command)], env=environment)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("MODEL", "--benchmarks", "gqq"), "unknown benchmark 'gqq'. Did you mean gqa?"),
        (("MODEL", "--benchmarks", "gqa", "--revision", "gqa"), "is not of the form BENCHMARK="),
        (("MODEL", "--benchmarks", "gqa", "--revision", "gqq=v1"), "unknown benchmark 'gqq'"),
        (
            ("MODEL", "--benchmarks", "gqa", "--data", "EMPTY", "--revision", "gqa=v1"),
            "the files come from EMPTY; leave one of the two out",
        ),
        (("MODEL", "--benchmarks", ","), "name a benchmark: all, mme_p"),
        (("EMPTY", "--benchmarks", "gqa"), "it lacks config.json, *.safetensors"),
        (("abc", "--benchmarks", "gqa"), "no stage in STORAGE has a key that begins with abc"),
        (("no model", "--benchmarks", "gqa"), "'no model' is no directory and no hub id"),
        (("MODEL", "--benchmarks", "gqa", "--data", "EMPTY"), "no files of gqa in EMPTY"),
    ],
)
def test_what_cannot_be_asked_is_named_before_anything_starts(
    given: tuple[str, ...], message: str, tmp_path: Path, model: str, reads: list[str]
) -> None:
    places = {"MODEL": model, "EMPTY": str(tmp_path / "empty"), "STORAGE": str(tmp_path / "runs")}
    (tmp_path / "empty").mkdir()
    command = [places.get(word, word) for word in given]
    found = evaluate(*command, "--actors", 2, "--storage", tmp_path / "runs")
    assert found.exit_code == 2
    for word, place in places.items():
        message = message.replace(word, place)
    assert message in " ".join(found.output.split())
    assert not Storage(str(tmp_path / "runs")).exists("stages", "answers")


def test_a_table_with_what_it_takes_to_read_it(
    tmp_path: Path, model: str, reads: list[str]
) -> None:
    command = (model, "--benchmarks", "mme_p,gqa", "--storage", tmp_path / "runs")
    found = evaluate(*command, "--blind", "--limit", 4)
    assert found.exit_code == 0, found.output
    assert "95 % interval" in found.output
    assert "97%!" in found.output
    assert "* a sum over the categories that --limit has reached" in found.output
    assert "! one answer to more than 95% of the questions: gqa" in found.output
    assert "Average" not in found.output
    assert f"next, all questions: kdscale evaluate {model} --benchmarks mme_p,gqa" in found.output
    assert "gqa, blind (4 of 4)" in found.output
    checked = ["mme_p", "mme_p", "gqa", "gqa"]  # once more to see whether the limit cuts
    assert reads == checked + ["mme_p"] * 2 + ["gqa"] * 2

    reads.clear()
    again = evaluate(*command, "--blind", "--limit", 4, "--json")
    assert reads == checked  # and not asked again
    document = json.loads(again.stdout)
    assert document["average"] is None
    row = document["benchmarks"]["gqa"]
    assert row["score"]["n"] == row["blind"]["n"] == 4
    assert len(list(Path(row["answers"]).glob("*.parquet"))) == 1
    storage = Storage(str(tmp_path / "runs"))
    (key, *_) = storage.names("stages", "answers")
    record = StageStore(storage, "answers", key).record()
    assert record["recipe"]["benchmark"] in ("mme_p", "gqa")
    assert (record["model"], "model" in record["recipe"]) == (model, False)  # a path is no key
    assert (record["revision"], record["model_revision"]) == ("c0ffee", None)


def test_a_limit_above_the_number_of_questions_is_none(
    tmp_path: Path, model: str, reads: list[str]
) -> None:
    command = (model, "--benchmarks", "mme_p", "--storage", tmp_path / "runs", "--limit", 9)
    found = evaluate(*command, "--revision", "mme_p=v7")
    assert found.exit_code == 0, found.output
    assert "the first" not in found.output
    assert "*" not in found.output
    assert "next, what the images add" in found.output
    assert "--revision mme_p=v7" in found.output
    whole = (*command[:-2], "--limit", 5, "--revision", "mme_p=v7")  # as many as there are
    assert "the first" not in evaluate(*whole).output
    assert len(Storage(str(tmp_path / "runs")).names("stages", "answers")) == 1
    (row,) = json.loads(evaluate(*command, "--revision", "mme_p=v7", "--json").stdout)[
        "benchmarks"
    ].values()
    assert row["limited"] is False
    alike = Score(0.0, 5, 3, 25.0, 0.2, 0.0, (0.0, 0.0), ())  # then a bootstrap has no width
    interval: Any = interval_of("mme_p", alike)  # pyright: ignore[reportArgumentType]
    assert row["score"]["interval"] == [interval.low, interval.high]
    assert f"0.00 – {interval.high:.2f}" in found.output
    assert interval.high > 1000
    record = json.loads(Path(row["answers"]).parent.joinpath("stage.json").read_text())
    assert record["revision"] == "c0ffee-v7"


def test_every_score_comes_with_its_n_on_a_narrow_terminal(
    tmp_path: Path, model: str, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdscale.eval import score

    def large(*arguments: Any) -> Any:
        """Scores with as many digits as any benchmark's."""
        return replace(score(*arguments), value=1234.56, n=12_578, interval=(1100.25, 1300.75))

    monkeypatch.setattr(kdscale.eval, "score", large)
    command = (model, "--benchmarks", "mme_p,gqa", "--storage", tmp_path / "runs", "--blind")
    found = evaluate(*command, columns=80)
    assert found.exit_code == 0, found.output
    assert "…" not in found.output
    (row,) = [line for line in found.output.splitlines() if line.strip().startswith("gqa  ")]
    assert row.split()[0] == "gqa"
    assert {"1234.56", "12,578", "25.00", "97%!"} <= set(row.split())


def test_all_beside_others_is_all() -> None:
    assert check_benchmarks(["all", "gqa"], NAMES) == list(NAMES)
    with pytest.raises(UnknownName, match="Did you mean gqa"):
        check_benchmarks(["all", "gqq"], NAMES)


def test_fp16_on_a_cpu_is_refused_before_anything_is_read(
    tmp_path: Path, model: str, reads: list[str]
) -> None:
    command = ("no model", "--benchmarks", "gqa", "--storage", tmp_path, "--precision", "fp16")
    found = evaluate(*command, "--gpus", 0, "--actors", 1)
    assert "fp16 on a CPU" in found.output
    assert reads == []


def test_no_more_actors_are_asked_than_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert _execution(3, 0.0, False).num_workers == 2
    assert "2 of the 3 actors fit this machine (2 cores)" in capsys.readouterr().out
    assert _execution(2, 0.0, False).num_workers == 2
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert _execution(3, 0.0, False).num_workers == 3


def test_the_average_of_all_and_a_model_by_its_key(
    tmp_path: Path, model: str, reads: list[str]
) -> None:
    storage = Storage(str(tmp_path / "runs"))
    stage = StageStore(storage, "finetune", "ab12" * 4)
    storage.put_directory(model, *stage.parts, "output", "model")
    stage.finish({})
    found = evaluate("ab1", "--benchmarks", "all", "--storage", storage.root)
    assert found.exit_code == 0, found.output
    assert "42.00" in found.output
    assert "next, what the images add: kdscale evaluate ab1 --benchmarks all" in found.output
    keys = storage.names("stages", "answers")
    assert len(keys) == len(NAMES)
    assert StageStore(storage, "answers", keys[0]).record()["inputs"] == [stage.key]


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for lmms-eval 0.7.3: the base class's abstract methods, and its manifest."""

    class Base(abc.ABC):
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

        @abc.abstractmethod
        def loglikelihood(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: Any) -> Any: ...

    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kdscale.lmms_model", raising=False)


@pytest.mark.usefixtures("lmms")
def test_lmms_eval_gets_the_same_answers(model: str) -> None:
    from importlib import import_module

    from kdscale.lmms_plugin import manifest
    from kdscale.models.vlm import load_vlm

    found = manifest()
    assert found.model_id == "kdscale"
    module, _, name = found.simple_class_path.rpartition(".")
    own = getattr(import_module(module), name)(pretrained=model, batch_size="4", device="cpu")
    asked = [replace(question, max_new_tokens=5) for question in asking.questions(8)]
    images = [q.image and Image.fromarray(np.asarray(decode_any(q.image))) for q in asked]
    own.task_dict = {"task": {"test": dict(enumerate(images))}}

    def request(number: int, **settings: Any) -> Any:
        text, shown = asked[number].prompt, lambda image: [image] if image else []
        options = {"max_new_tokens": 5, "until": "\n\n", **settings}
        return SimpleNamespace(args=(f"<image>\n{text}", options, shown, number, "task", "test"))

    answers = own.generate_until([request(number) for number in range(8)])
    expected = Generator(*load_vlm(model), decode_any)(prompts_of(asked, blind=False))
    assert answers == [answer.text.partition("\n\n")[0].strip() for answer in expected]
    stop = answers[0][2]
    (cut,) = own.generate_until([request(0, until=[stop])])
    assert cut == answers[0].partition(stop)[0].strip()
    with pytest.raises(ConfigError, match="task 3 asks for sampling"):
        own.generate_until([request(3, do_sample=True)])
    own.task_dict["task"]["test"][0] = "film.mp4"
    with pytest.raises(DataError, match="task 0 shows a str"):
        own.generate_until([request(0)])
    with pytest.raises(ConfigError, match="no likelihoods"):
        own.loglikelihood([])
