"""`cluster.local.yaml`, brought up: both ways to submit give what a run without it gives."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent
SMALLEST, QUICKSTART = "tests/cluster_sweep.py", "sweeps/quickstart.py"
WITH_QUICKSTART = "KDSCALE_TEST_QUICKSTART"
# Threads share a machine's cores by how many trials run at once, and sums are rounded by threads.
ONE_THREAD = ["--set", "run.threads_per_worker=1"]
lacking = [name for name in ("unshare", "rsync", "curl", "ssh") if shutil.which(name) is None]
lacking += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
lacking += [] if importlib.util.find_spec("aiohttp_cors") else ["ray[default]"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of its own are root's to make"),
    pytest.mark.skipif(bool(lacking), reason=f"lacks {', '.join(lacking)}"),
]


def outputs(root: Path) -> dict[str, Any]:
    """Returns the files that finished stages have put out; CKA as numbers, but for rounding."""
    done = [path.parent for path in root.glob("stages/*/*/DONE")]
    files = [file for stage in done for file in stage.glob("output/**/*") if file.is_file()]
    return {str(file.relative_to(root)): content(file) for file in files}


def content(file: Path) -> Any:
    """Returns a file's bytes; numbers, CKA among them, to nine digits.

    NumPy rounds products of odd widths by where their factors lie in memory.
    """
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as found:
            rounded = {name: found[name] for name in found.files}
        return {
            name: np.round(values, 9).tolist() if values.dtype.kind == "f" else values.tolist()
            for name, values in rounded.items()
        }
    if file.suffix == ".json":
        return json.loads(file.read_text(), parse_float=lambda text: round(float(text), 9))
    return file.read_bytes()


@pytest.mark.parametrize(
    "sweep",
    [
        SMALLEST,
        pytest.param(
            QUICKSTART,
            marks=pytest.mark.skipif(
                WITH_QUICKSTART not in os.environ,
                reason=f"takes a quiet machine half an hour: {WITH_QUICKSTART}=1",
            ),
        ),
    ],
)
def test_a_cluster_gives_what_one_machine_gives(tmp_path: Path, sweep: str) -> None:
    own = ["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
    script = REPOSITORY / "tests" / "local_cluster.sh"
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["unshare", *own, script, Path(sys.executable).parent, work, sweep, *ONE_THREAD],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "without the token: 401" in done.stdout
    assert "Usage: kdscale cluster watch" in done.stdout
    alone = tmp_path / "alone"
    command = [sys.executable, sweep, "--seeds", "0,1", "--storage", alone, *ONE_THREAD]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    expected = outputs(alone)
    students = {name for name in expected if name.startswith("stages/distill/")}
    assert sum(name.endswith("metrics.json") for name in students) >= 2
    assert outputs(work / "home" / "kdscale-runs") == expected
