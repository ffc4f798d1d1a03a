"""The architecture's promises about imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdscale"
LAYERS = {
    "core": 0,
    "data": 1,
    "models": 1,
    "losses": 1,
    "eval": 1,
    "analysis": 1,
    "mini": 1,
    "stages": 2,
    "sweep": 3,
    "cli": 6,
    "cli_bench": 4,
    "cli_cka": 4,
    "cli_cluster": 4,
    "cli_data": 4,
    "cli_doctor": 4,
    "cli_evaluate": 4,
    "cli_export": 4,
    "cli_gc": 5,
    "cli_logs": 4,
    "cli_plan": 4,
    "cli_request": 4,
    "lmms_model": 3,
    "lmms_plugin": 3,
    "cli_zero_shot": 4,
    "terminal": 1,
}
UPWARD = {("sweep/grid.py", "cli")}  # `sweep.main()` makes a sweep file a program
RAY_FILES = {
    "sweep/cluster_check.py",
    "sweep/doctor.py",
    "sweep/schedule.py",
    "sweep/search.py",
    "sweep/steer.py",
    "sweep/suggest.py",
    "sweep/upload.py",
    "stages/group.py",
    "stages/worker.py",
    "data/stream.py",
}


def importers(module: str) -> set[str]:
    pattern = re.compile(rf"^\s*(import|from) {module}\b", re.MULTILINE)
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if pattern.search(path.read_text())
    }


def test_ray_and_mlflow_stay_where_they_belong() -> None:
    assert importers("ray") <= RAY_FILES
    assert importers("mlflow") <= {"sweep/tracking.py", "sweep/tracked.py"}


def test_import_kdscale_is_light() -> None:
    code = "import sys, kdscale; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_downwards(path: Path) -> None:
    file = str(path.relative_to(PACKAGE))
    part = file.split("/")[0].removesuffix(".py")
    if part not in LAYERS:
        return
    for target in re.findall(r"^\s*(?:from|import) kdscale\.(\w+)", path.read_text(), re.MULTILINE):
        allowed = target == part or (file, target) in UPWARD
        assert allowed or LAYERS[target] < LAYERS[part], f"{file} imports kdscale.{target}"
