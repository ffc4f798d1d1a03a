"""What shells make of a manifest's commands: variables that last, locks, a job's entrypoint."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.sweep import cluster_kube
from kdscale.sweep.cluster import load_cluster
from kdscale.sweep.cluster_check import exported, problems
from kdscale.sweep.cluster_kube import rayjob
from kdscale.sweep.cluster_ray import ray_on_this_machine

DESCRIBED = Path(__file__).parent.parent / "cluster.toml"
EXPORT = "export RAY_AUTH_MODE=token"


@pytest.mark.parametrize(
    ("commands", "lasts"),
    [
        ([EXPORT], False),
        ([f"{EXPORT}; echo done > ~/.bashrc"], False),
        ([f"echo '{EXPORT}'"], False),
        ([f"echo '{EXPORT}' > /tmp/note"], False),
        ([f"echo '{EXPORT}' > ~/.kdscale/env.sh"], False),  # read by what setup_node.sh writes
        ([f"echo '{EXPORT}' > ~/.kdscale/env.sh", "bash setup_node.sh requirements.lock"], True),
        ([f"echo {EXPORT} >> ~/.bashrc"], True),
        ([f"printf '{EXPORT}\\nexport A=b\\n' >>$HOME/.profile"], True),
        ([f'echo "{EXPORT}" | sudo tee -a /etc/profile.d/ray.sh'], True),
        ([f"cat >> ~/.bashrc <<EOF\n# Ray's token\n{EXPORT}\nEOF"], True),
    ],
)
def test_an_export_lasts_in_a_file_that_shells_read(commands: list[str], lasts: bool) -> None:
    assert exported(commands).get("RAY_AUTH_MODE") == ("token" if lasts else None)


@pytest.mark.parametrize(
    "command",
    [
        "cd ~/kdscale && sudo pip3 install -r requirements.lock",
        "uv pip sync --python ~/venv/bin/python \\\n  ~/kdscale/requirements.lock; true",
        "bash -lc 'cd ~/kdscale\npython3 -m pip install --requirement=requirements.lock'",
    ],
)
def test_a_lock_may_be_installed_otherwise(command: str) -> None:
    config = ray_on_this_machine(load_cluster(DESCRIBED))
    written = config["setup_commands"][0].replace("~/.kdscale/env.sh", "~/.bashrc")
    config["setup_commands"] = [written, command]
    assert list(problems(config)) == []


@pytest.mark.parametrize(
    ("written", "options", "message"),
    [
        (DESCRIBED.read_bytes(), ["--out", "/absent/x.yaml"], "cannot write /absent/x.yaml: No"),
        (b'name = "\xff"', [], "is no TOML"),
        (
            DESCRIBED.read_bytes().replace(b'storage = "s3:', b'storage = "" # "s3:'),
            [],
            "storage.*at least 1 character",
        ),
    ],
)
def test_what_cannot_be_rendered_is_said_in_words(
    tmp_path: Path, written: bytes, options: list[str], message: str
) -> None:
    source = tmp_path / "cluster.toml"
    source.write_bytes(written)
    command = ["cluster", "render", "--source", str(source), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert re.search(message, " ".join(done.output.split()))


@pytest.mark.parametrize("through_ray", [False, True])
def test_a_job_runs_the_entrypoint_as_a_shell_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, through_ray: bool
) -> None:
    monkeypatch.setattr(cluster_kube, "CODE", str(tmp_path))
    job = rayjob(load_cluster(DESCRIBED), """printf '[%s]' 'a=b c' "it's" '$HOME' \"$PWD\" """)
    entrypoint = job["spec"]["entrypoint"]
    if through_ray:  # as `ray job submit` hands it on
        entrypoint = shlex.join(shlex.split(entrypoint))
    done = subprocess.run(["sh", "-c", entrypoint], capture_output=True, text=True, check=True)
    assert done.stdout == f"[a=b c][it's][$HOME][{tmp_path}]"
