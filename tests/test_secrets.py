"""Secrets in the environment and in URLs reach no file and no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import Study, answers, finish, make_sweep, recipe
from typer.testing import CliRunner, Result

from kdscale.cli import app
from kdscale.core.config import DataSpec
from kdscale.core.redaction import holds_secret, redacted
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import SecretInUrl, StorageError
from kdscale.data.raw import expand
from kdscale.sweep.node_checks import check_mlflow

CANARY = "CANARY"
SECRETS = [
    f"https://user:{CANARY}@host/a/{{0..1}}.tar",
    f"s3://key:{CANARY}@bucket/a",
    f"simplecache::s3://key:{CANARY}@bucket/a",
    f"https://host/a.tar?token={CANARY}",
    f"https://host/a.tar?expires=3&X-Amz-Signature={CANARY}&X-Amz-Credential={CANARY}",
    f"https://account.blob.example/a/b.tar?sv=2024&sig={CANARY}",
    f"gs://{CANARY}@bucket/a",
    f"http://user:CA/{CANARY}@host/x",
    f"postgresql+psycopg://mlflow:{CANARY}@/db?host=/run&password={CANARY}",
]
ALONE: dict[str, Any] = {"stages": [recipe(loss="clip")], "baseline": None}
PLAIN = [
    "s3://bucket/date=2024/shard-????.tar",
    "/data/{00000..00010}.tar",
    "https://host:5000/x",
    "https://host:5000/files/a@b.tar",
    "sftp://host/a.tar",
    "sqlite:////home/a@b/mlflow.db",
    "hf-hub:timm/ViT-B-16@main",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_is_hidden_and_the_rest_is_not(url: str) -> None:
    text = redacted(f"cannot read {url} (403)")
    assert CANARY not in text
    assert text.startswith("cannot read ")
    assert text.endswith("(403)")
    assert redacted(text) == text
    assert holds_secret(url)
    assert CANARY not in str(StorageError(text, f"looked at {url}"))


@pytest.mark.parametrize("url", PLAIN)
def test_what_is_no_secret_stays(url: str) -> None:
    assert redacted(url) == url
    assert not holds_secret(url)


@pytest.mark.parametrize("url", SECRETS)
def test_urls_that_are_kept_may_hold_none(url: str) -> None:
    for taken in (Storage, expand, lambda where: DataSpec(name="x", urls=where)):
        with pytest.raises(SecretInUrl, match="Take it out") as refused:
            taken(url)
        assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", CANARY),
        ("WANDB_KEY", CANARY),
        ("MY_SSH_KEY", CANARY),
        ("DB_PASS", CANARY),
        ("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=a;AccountKey={CANARY}"),
        ("FSSPEC_S3", f'{{"key": "not so secret", "secret": "{CANARY}"}}'),
        (
            "FSSPEC_HTTP",
            f'{{"client_kwargs": {{"headers": {{"Authorization": "Bearer {CANARY}"}}}}}}',
        ),
        ("FSSPEC_WEBDAV", f'{{"auth": ["me", "{CANARY}"]}}'),
    ],
)
def test_a_failure_does_not_repeat_what_the_environment_keeps_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    canary = f"{CANARY}-in-{name}"
    monkeypatch.setenv(name, value.replace(CANARY, canary))
    monkeypatch.setenv("KEYBOARD_LAYOUT", "attempt refused")
    stage = StageStore(Storage(str(tmp_path)), "distill", "0" * 16)
    said = value.replace(CANARY, canary) if "Account" in value else canary
    stage.fail(f"RuntimeError: attempt refused for {said}", final=False)
    assert (stage.failure() or {})["message"] == "RuntimeError: attempt refused for ***"
    assert canary not in str(StorageError(f"attempt refused for {said}"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (f"{CANARY}-key\n", f"the key {CANARY}-key is refused"),
        (f"{CANARY}-key\n", f"illegal value b'Bearer {CANARY}-key\\n'"),
        (f"-----BEGIN KEY-----\n{CANARY}-key\n-----END KEY-----\n", f"line 2: {CANARY}-key"),
        (f"{CANARY}-key/+ &", f"GET https://host/{CANARY}-key%2F%2B%20%26"),
        (f"{CANARY}-key/+ &", f"GET https://host/{CANARY}-key/%2b%20%26"),
        (f"-----BEGIN\\n{CANARY}-key\\n-----END", f"line 2: {CANARY}-key"),
        (f'{{"user": "me", "private_key": "{CANARY}-key"}}', f"refused: {CANARY}-key"),
        (f"{CANARY}-kéy", f"got {f'{CANARY}-kéy'.encode()!r}"),
        (f"{CANARY}-key'\"", f"{{'password': '{CANARY}-key\\'\"'}}"),
    ],
)
def test_a_value_is_hidden_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    for name in ("DB_PASSPHRASE", "MYSQL_PWD"):
        monkeypatch.setenv(name, value)
        assert CANARY not in redacted(said)
        assert "***" in redacted(said)
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A finished sweep, its file beside it, on a machine full of secrets."""
    place = tmp_path_factory.mktemp("study")
    study = Study(place, [make_sweep(**ALONE)])
    (stage,) = study.plan.stages.values()
    finish(stage, study.storage, answers(30), cka=0.5)
    (place / "little.py").write_text(
        "from pathlib import Path\nfrom studies import make_scale, make_sweep\n"
        "from test_secrets import ALONE\n"
        f"sweep = make_sweep(scale=make_scale(Path({str(place)!r})), **ALONE)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, CANARY)
        patch.chdir(place)
        yield study


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """Invokes a command as the terminal does, where reports find it again."""
    monkeypatch.setattr(sys, "argv", ["kdscale", *words])
    return CliRunner().invoke(app, list(words))


def leaks(*folders: Path) -> list[Path]:
    """Returns the files that hold the canary."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    return [path for path in files if CANARY.encode() in path.read_bytes()]


def test_a_run_keeps_and_prints_no_secret(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "little.py", "--storage", study.storage.root]
    away = f"http://user:{CANARY}@127.0.0.1:9/"
    outputs: list[str] = []
    for uri in (None, away):
        found = command(monkeypatch, *words, *(["--tracking-uri", uri] if uri else []))
        assert found.exit_code == 0, found.output
        outputs.append(found.output)
    assert "http://***@127.0.0.1:9" in outputs[1]
    assert [text for text in outputs if CANARY in text] == []
    assert leaks(Path()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--storage", f"s3://key:{CANARY}@bucket/runs"],
        ["--data", f"https://user:{CANARY}@host/{{0..1}}.tar"],
        ["--data", f"cc12m=https://host/a.tar?token={CANARY}"],
        ["--set", f"student=https://user:{CANARY}@host/a"],
        ["--set", f"data=https://host/a?X-Amz-Signature={CANARY}"],
    ],
)
def test_a_refused_secret_is_neither_printed_nor_kept(
    options: list[str], study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", "little.py", "--storage", study.storage.root, *options]
    found = command(monkeypatch, *words)
    assert found.exit_code == 2
    assert CANARY not in found.output
    assert leaks(Path()) == []


def test_a_failure_s_note_holds_no_secret(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    stage.fail(f"403 for url https://user:{CANARY}@host/x?token={CANARY}", final=False)
    assert "https://***@host" in (stage.failure() or {})["message"]
    assert CANARY not in str(stage.failure())


def test_the_doctor_tells_no_secret() -> None:
    found = check_mlflow(f"http://user:{CANARY}@127.0.0.1:9")
    assert found.ok is False
    assert CANARY not in str(found)
