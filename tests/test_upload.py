"""What `ray job submit` would send: counted as Ray does, left out by lines that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.core.types import ConfigError
from kdscale.sweep.upload import UploadTooBig, find_upload


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with code, and what must not be sent with it."""
    for name, size in (("sweep.py", 400), ("lib/a.py", 300), (".git/pack", 10**6), ("runs/x", 900)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("runs/\n")
    return tmp_path


def test_what_is_sent_is_what_ray_packs(project: Path, tmp_path_factory: Any) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    upload = find_upload(project)
    upload.check()
    assert upload.files.keys() == {"sweep.py", "lib/a.py", ".gitignore"}
    package = tmp_path_factory.mktemp("packed") / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    assert upload.size_bytes == pytest.approx(package.stat().st_size, abs=100)


def test_what_is_too_big_is_named_and_may_be_left_out(project: Path) -> None:
    for name in ("shards/00000.tar", "lib/weights.pt"):
        path = project / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(120 << 20)  # a hole: it takes no room
    with pytest.raises(UploadTooBig, match=r"(?s)240\.0 MiB .* takes 100\.0 MiB") as found:
        find_upload(project).check()
    assert "shards/00000.tar" in str(found.value)
    names = find_upload(project).superfluous()
    assert sorted(names) == ["/lib/weights.pt", "/shards/"]
    (project / ".rayignore").write_text("\n".join(names))
    find_upload(project).check()
    with pytest.raises(ConfigError, match="no directory"):
        find_upload(project / "sweep.py")


def test_lines_to_leave_out_match_names_with_signs_of_patterns(project: Path) -> None:
    names = ("sweeps/my data/x [1].bin", "sweeps/a.py", "b*c/d", "e?\\f#.pt", "!g", "ends ")
    for name in names:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(0 if name.endswith(".py") else 120 << 20)
    lines = find_upload(project).superfluous()
    assert "/sweeps/my data/x \\[1\\].bin" in lines
    (project / ".rayignore").write_text("\n".join(lines))
    left = find_upload(project)
    left.check()
    assert {"sweep.py", "sweeps/a.py"} <= left.files.keys()
