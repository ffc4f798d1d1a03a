"""What a stage has said is kept beside its journal, and shown from the storage."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console
from studies import Study, make_sweep, recipe
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.core import stage_log
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import Lease
from kdscale.core.stage_log import LogReader, StageLog
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StageStopped
from kdscale.sweep.logs import follow_logs, state_line
from kdscale.sweep.status import look


@pytest.fixture
def stage(tmp_path: Path) -> StageStore:
    return StageStore(Storage(str(tmp_path)), "distill", "3fa9c0de00000000")


def text_of(stage: StageStore) -> str:
    return "\n".join(line for lines in LogReader(stage).new_lines().values() for line in lines)


def write(stage: StageStore, lines: int) -> None:
    """Writes a log of that many lines beside the first one."""
    with StageLog(stage, "worker0") as log:
        for number in range(lines):
            log.say(f"line {number}")


def test_a_log_holds_what_is_printed_warned_and_logged(
    stage: StageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("library")
    handler = logging.StreamHandler()  # keeps the stream that it finds, as those of libraries do
    library.addHandler(handler)
    with StageLog(stage, "worker0", title="vit_t16") as log:
        print("printed")
        sys.stderr.write(warnings.formatwarning("warned", UserWarning, "file.py", 1))
        library.warning("logged")
        thread = threading.Thread(target=print, args=("from a thread",))
        thread.start()
        thread.join()
        sys.stderr.write("10 %\r50 %\r100 %\n")
        log.say("said")
    print("after the end")
    library.removeHandler(handler)
    text = text_of(stage)
    for found in ("vit_t16: worker0 on", "printed", "warned", "logged", "from a thread", "said"):
        assert found in text
    assert "100 %" in text
    assert "50 %" not in text
    assert "after the end" not in text
    assert capsys.readouterr().out == "printed\nfrom a thread\nafter the end\n"


def test_nothing_secret_is_kept(stage: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh1234")
    with StageLog(stage, "worker0"):
        print("header hf_abcdefgh1234, s3://user:password@host/x, https://h/f?X-Amz-Signature=ab12")
    text = text_of(stage)
    for secret in ("hf_abcdefgh1234", "password", "ab12"):
        assert secret not in text
    assert "s3://***@host/x" in text


def test_an_error_is_told_once_with_its_traceback_and_a_stop_in_a_line(stage: StageStore) -> None:
    from kdscale.stages.worker import note_failure

    def attempt() -> None:
        with StageLog(stage, "worker0"):
            try:
                _ = 1 // 0
            except ZeroDivisionError as error:
                note_failure(stage, error)
                raise

    with pytest.raises(ZeroDivisionError):
        attempt()
    assert (stage.failure() or {})["message"].startswith("ZeroDivisionError")
    text = text_of(stage)
    assert text.count("ZeroDivisionError") == 1
    assert "_ = 1 // 0" in text
    other = StageStore(stage.storage, "distill", "b")
    with pytest.raises(StageStopped), StageLog(other, "worker0"):
        raise StageStopped("stopped early at step 4")
    assert "stopped early at step 4" in text_of(other)
    assert "Traceback" not in text_of(other)


def test_a_long_log_keeps_its_beginning_and_its_end(
    stage: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_log, "HEAD_LINES", 3)
    monkeypatch.setattr(stage_log, "TAIL_LINES", 4)
    reader, seen = LogReader(stage), list[str]()
    with StageLog(stage, "worker0") as log:
        for number in range(10):
            log.say(f"line {number}")
            if number % 4 == 0:
                log._flush()
                seen += [line for lines in reader.new_lines().values() for line in lines]
    seen += [line for lines in reader.new_lines().values() for line in lines]
    assert [line[20:] for line in seen[1:]] == [f"line {number}" for number in range(10)]
    kept = text_of(stage).splitlines()
    assert kept[3] == "... 4 lines left out ..."
    assert [line[20:] for line in kept[1:3] + kept[4:]] == [
        f"line {number}" for number in (0, 1, 6, 7, 8, 9)
    ]


def test_a_storage_that_cannot_be_written_does_not_stop_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages").write_text("a file in the way")
    with StageLog(StageStore(Storage(str(tmp_path)), "distill", "k"), "worker0"):
        print("goes on")
    print("and ends")
    assert capsys.readouterr().out == "goes on\nand ends\n"
    assert (tmp_path / "stages").read_text() == "a file in the way"


def test_what_is_not_utf8_is_written_all_the_same(stage: StageStore) -> None:
    with pytest.raises(FileNotFoundError), StageLog(stage, "worker0"):
        raise FileNotFoundError("bad file \udcff.jpg")
    assert r"bad file \udcff.jpg" in text_of(stage)


def test_who_has_nothing_to_tell_writes_nothing(stage: StageStore) -> None:
    log = StageLog(stage, "actor", quiet=True)
    for _ in range(2):
        with log:
            pass
    assert stage.storage.names(*stage.parts, "log") == []
    for text in ("once", "twice"):
        with log:
            print(text)
    assert len(stage.storage.names(*stage.parts, "log")) == 1
    assert "twice" in text_of(stage)


def run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["logs", *words], env={"COLUMNS": "200"})
    return found.exit_code, found.output


def test_the_command_shows_log_journal_and_failure(stage: StageStore) -> None:
    from kdscale.stages.worker import noting

    line = {"step": 7, "total": 2.5, "samples_per_s": 100.0, "data_wait": 0.0}
    JournalWriter(stage, 1).append(line)
    with pytest.raises(RuntimeError), StageLog(stage, "worker0"), noting(stage):
        raise RuntimeError("the well is [poisoned]")
    stage.fail("RuntimeError: the well is [poisoned]", final=False)
    code, text = run("3fa9", "--storage", stage.storage.root)
    assert code == 0
    assert "worker0" in text
    assert "Traceback (most recent call last)" in text
    assert "step 7/?  loss 2.500" in text
    assert "failed (RuntimeError: the well is [poisoned])" in text
    code, text = run("4b", "--storage", stage.storage.root)
    assert code == 2
    assert "UnknownStage" in text
    write(StageStore(stage.storage, "embed", "3fa8"), 1)
    code, text = run("3fa", "--storage", stage.storage.root)
    assert code == 2
    assert "may be distill 3fa9c0de00000000, embed 3fa8" in text


def test_the_log_of_a_stage_whose_turn_has_not_come_says_what_status_says(tmp_path: Path) -> None:
    study = Study(tmp_path, [make_sweep(stages=[recipe(teacher="clip_b16")], baseline=None)])
    teacher, student = (stage.store(study.storage) for stage in study.plan.stages.values())
    with ExitStack() as leases:
        for held, before in ((teacher, None), (student, teacher)):
            lease = Lease.acquire(held, after=before)
            assert lease is not None
            leases.enter_context(lease)
        status = look(study.plan)
        assert [each.state for each in status.stages] == ["running", "waiting"]
        assert status.at_once == 1
        code, text = run(student.key, "--storage", study.storage.root)
        assert (code, text.splitlines()[-1]) == (0, f"distill {student.key}: waiting")
        teacher.finish({})
        assert [each.state for each in look(study.plan).stages] == ["done", "running"]
        assert state_line(student) == f"distill {student.key}: running"


def test_following_shows_each_line_once_until_the_stage_is_done(stage: StageStore) -> None:
    console = Console(file=io.StringIO(), width=120)
    with StageLog(stage, "worker0") as log:
        log.say("first")
        thread = threading.Thread(target=follow_logs, args=(stage, console, 0.02))
        thread.start()
        log._flush()
        time.sleep(0.1)
        log.say("second")
    stage.finish({"name": "vit_t16"})
    thread.join(5)
    assert not thread.is_alive()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("first") == text.count("second") == 1
    assert text.endswith("distill vit_t16: done\n")
