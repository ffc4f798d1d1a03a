"""What `ray job submit --working-dir` would send, and whether Ray would take it.

Ray says so only after it has packed everything, and does not say what is too big.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kdscale.core.types import ConfigError

NUM_NAMED = 5
ENTRY_BYTES = 30 + 46 + 2 * 20  # a file's two headers in an archive, its name aside
IGNORED = ".rayignore"


class UploadTooBig(ConfigError):
    """A working directory that Ray would refuse."""


@dataclass(frozen=True)
class Upload:
    """Files that Ray would pack, uncompressed as it does.

    Attributes:
        files: Relative path to size in bytes.
        cap_bytes: What Ray's job server takes at most.
    """

    root: Path
    files: dict[str, int]
    cap_bytes: int

    @property
    def size_bytes(self) -> int:
        """The size of the package."""
        names = sum(len(name.encode()) for name in self.files)
        return sum(self.files.values()) + 2 * names + ENTRY_BYTES * len(self.files)

    def largest(self) -> list[tuple[str, int]]:
        """Returns the largest files, with their sizes."""
        return sorted(self.files.items(), key=lambda item: -item[1])[:NUM_NAMED]

    def superfluous(self) -> list[str]:
        """Returns lines for `.rayignore`: the fewest directories and files that must be left out.

        Python files are what a job needs: a directory that holds any is not named, but what in it
        is no Python file.
        """
        sizes: dict[str, int] = {}
        code = {PurePosixPath(name).parts[0] for name in self.files if name.endswith(".py")}
        for name, size in self.files.items():
            top, *below = PurePosixPath(name).parts
            if top not in code:
                place = f"/{top}/" if below else f"/{top}"
                sizes[place] = sizes.get(place, 0) + size
            elif not name.endswith(".py"):
                sizes["/" + name] = size
        named: list[str] = []
        left = self.size_bytes
        for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
            if left <= self.cap_bytes:
                break
            named.append(_literal(name))
            left -= size
        return named

    def check(self) -> None:
        """Refuses what Ray would refuse.

        Raises:
            UploadTooBig: Naming the largest files, and what to leave out.
        """
        if self.size_bytes <= self.cap_bytes:
            return
        largest = "\n".join(f"  {mebibytes(size):>10}  {name}" for name, size in self.largest())
        lines = "\n".join(f"  {name}" for name in self.superfluous())
        raise UploadTooBig(
            f"{self.root} is {mebibytes(self.size_bytes)} in {len(self.files):,} files; "
            f"`ray job submit` takes {mebibytes(self.cap_bytes)}. The largest:\n{largest}\n"
            f"Data belong in the storage. Leave these out, each a line of {self.root / IGNORED}:\n"
            f"{lines}"
        )


def find_upload(root: Path) -> Upload:
    """Finds what Ray would pack of a directory, by Ray's own rules.

    Raises:
        ConfigError: If it is no directory.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    if not root.is_dir():
        raise ConfigError(f"{root} is no directory")
    root, files = root.absolute(), {}

    def add(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.stat().st_size

    excludes: Sequence = [_get_excludes(root, ray_constants.get_runtime_env_default_excludes())]
    keeps_git_rules = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, list(excludes), add, include_gitignore=keeps_git_rules)
    return Upload(root, files, ray_constants.DASHBOARD_CLIENT_MAX_SIZE)


def _literal(name: str) -> str:
    """Returns the pattern that matches a name alone; blanks that a line loses match any sign."""
    escaped = re.sub(r"[\\*?[\]]", r"\\\g<0>", name)
    return re.sub(r"[\n\r]|\s+$", lambda blanks: "?" * len(blanks[0]), escaped)


def mebibytes(size: int) -> str:
    """Returns a size for people."""
    return f"{size / 2**20:,.1f} MiB"
