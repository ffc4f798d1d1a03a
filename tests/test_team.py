"""MLflow for a team: a sweep tracked to a server with PostgreSQL and an object store."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from team_server import ADMIN, ADMIN_PASSWORD, MlflowServer, postgres
from test_study import STEPS, SWEEP, Study, at_step, pattern

from kdscale.sweep.tracking import PARENT_TAG

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]
__all__ = ["pattern"]
TINY = SWEEP.replace("num_workers=2, cpus_per_worker=0.5", "num_workers=0")
DATABASE_PASSWORD, PASSWORD = "CANARY-of-the-role", "CANARY-of-a-user"
AUTH = """
[mlflow]
default_permission = EDIT
database_uri = {uri}
admin_username = admin
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres(DATABASE_PASSWORD) as port:
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/mlflow"


@pytest.fixture(scope="module")
def server(
    database: str, bucket: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    place = tmp_path_factory.mktemp("server")
    (place / "auth.ini").write_text(AUTH.format(uri=database))
    (place / "here").mkdir()
    variables = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "PGPASSWORD": DATABASE_PASSWORD,
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(place / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "CANARY-of-the-forms",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WORKERS": "1",
    }
    server = MlflowServer(place / "here", variables)
    server.start()
    try:
        user = {"username": "ada", "password": PASSWORD}
        assert ask(server, "users/create", (ADMIN, ADMIN_PASSWORD), user) == 200
        yield server
    finally:
        server.stop()


def ask(
    server: MlflowServer,
    page: str,
    login: tuple[str, str] | None = None,
    document: Any = None,
    **headers: str,
) -> int:
    """Returns the status of an answer."""
    data = None if document is None else json.dumps(document).encode()
    if login is not None:
        headers["Authorization"] = f"Basic {b64encode(':'.join(login).encode()).decode()}"
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request(f"{server.url}/api/2.0/mlflow/{page}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def study(
    server: MlflowServer, tmp_path_factory: pytest.TempPathFactory, pattern: str
) -> Iterator[Study]:
    """A sweep whose results lie in the object store; the server goes away and comes back."""
    place = tmp_path_factory.mktemp("study")
    study = Study(place, pattern, TINY, "s3://bucket/runs")
    with pytest.MonkeyPatch.context() as patch:
        address = server.url.replace("://", f"://ada:{PASSWORD}@")
        patch.setenv("MLFLOW_TRACKING_URI", address)
        process = study.start()
        study.wait_for(at_step(4))
        server.stop()
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output[-3000:]
        assert "MLflow is not reachable" in output
        server.start()
        again = study.finish()
        assert "nothing to run" in again
        assert "http://***@127.0.0.1" in again
        (server.folder / "output").write_text(output + again)
        yield study


@pytest.fixture(scope="module")
def client(study: Study, server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.url.replace("://", f"://ada:{PASSWORD}@"))


@pytest.fixture(scope="module")
def runs(client: Any) -> dict[str, Any]:
    """The runs by level."""
    experiment = client.get_experiment_by_name("kdscale/kills")
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    found = client.search_runs([experiment.experiment_id])
    levels = {run.data.tags["level"]: run for run in found if run.data.tags["level"] != "stage"}
    (distill,) = [run for run in found if run.data.tags.get("stage") == "distill"]
    assert {run.info.status for run in found} == {"FINISHED"}
    return levels | {"distill": distill}


def test_runs_are_a_tree_and_each_step_is_there_once(client: Any, runs: dict[str, Any]) -> None:
    parents = {level: run.data.tags.get(PARENT_TAG) for level, run in runs.items()}
    assert parents["sweep"] is None
    assert parents["trial"] == runs["sweep"].info.run_id
    assert parents["distill"] == runs["trial"].info.run_id
    history = client.get_metric_history(runs["distill"].info.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))


def test_runs_are_in_postgresql(runs: dict[str, Any], database: str) -> None:
    import psycopg

    uri = database.replace("+psycopg", "").replace("mlflow@", f"mlflow:{DATABASE_PASSWORD}@")
    with psycopg.connect(uri) as connection:
        rows = connection.execute("SELECT count(*) FROM metrics WHERE key = 'loss'").fetchall()
    assert rows == [(STEPS,)]


def test_artifacts_come_through_the_server_out_of_the_bucket(
    client: Any, runs: dict[str, Any], bucket: Path, tmp_path: Path
) -> None:
    run = runs["sweep"].info
    read = Path(client.download_artifacts(run.run_id, "report/report.html", str(tmp_path)))
    (kept,) = (bucket / "mlflow").rglob("report.html")
    assert run.run_id in kept.parts
    assert read.read_bytes() == kept.read_bytes()
    assert len(read.read_bytes()) > 10_000


def test_nothing_is_written_beside_the_server_or_the_sweep(
    study: Study, server: MlflowServer
) -> None:
    assert {path.name for path in study.folder.iterdir()} <= {"kills.py", "__pycache__"}
    assert {path.name for path in server.folder.iterdir()} == {"log", "output"}


def test_no_password_is_kept_or_printed(study: Study, server: MlflowServer, bucket: Path) -> None:
    kept = [path for path in bucket.rglob("*") if path.is_file()]
    assert len(kept) > 20
    places = [*kept, server.folder / "log", server.folder / "output"]
    assert [path for path in places if b"CANARY" in path.read_bytes()] == []


def test_the_server_asks_who_one_is_and_listens_to_this_machine(server: MlflowServer) -> None:
    page = "experiments/search?max_results=1"
    assert ask(server, page) == 401
    assert ask(server, page, ("ada", "guessed")) == 401
    assert ask(server, page, ("ada", PASSWORD)) == 200
    assert ask(server, page, ("ada", PASSWORD), Host="elsewhere.example") == 403
    process = psutil.Process(server.process.pid)
    own = [process, *process.children(recursive=True)]
    sockets = [each for one in own for each in one.net_connections("inet")]
    assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
