"""`cluster.local.yaml`, brought up: both ways to submit give what a run without it gives."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SWEEP = "tests/cluster_sweep.py"
lacking = [name for name in ("unshare", "rsync", "curl", "ssh") if shutil.which(name) is None]
lacking += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
lacking += [] if importlib.util.find_spec("aiohttp_cors") else ["ray[default]"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of its own are root's to make"),
    pytest.mark.skipif(bool(lacking), reason=f"lacks {', '.join(lacking)}"),
]


def outputs(root: Path) -> dict[str, bytes]:
    """Returns the files that finished stages have put out."""
    done = [path.parent for path in root.glob("stages/*/*/DONE")]
    files = [file for stage in done for file in stage.glob("output/**/*") if file.is_file()]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def test_a_cluster_gives_what_one_machine_gives(tmp_path: Path) -> None:
    own = ["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
    script = REPOSITORY / "tests" / "local_cluster.sh"
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["unshare", *own, script, Path(sys.executable).parent, work, SWEEP],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "without the token: 401" in done.stdout
    alone = tmp_path / "alone"
    command = [sys.executable, SWEEP, "--seeds", "0,1", "--storage", alone]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    expected = outputs(alone)
    assert sum(name.endswith("metrics.json") for name in expected) == 2
    assert outputs(work / "home" / "kdscale-runs") == expected
