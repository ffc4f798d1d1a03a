"""The stage store: content-keyed directories on any fsspec filesystem.

`<root>/stages/<kind>/<key>/` holds a stage: `stage.json`, `journal/`, `checkpoints/`, `output/`
and, written last, `DONE`. A stage without `DONE` does not exist for anybody else. One writer at
a time holds the newest `LEASE-<number>` (`kdscale.core.lease`).

A disk that is read-only, full or out of reach for a moment is waited for: a training stands still
meanwhile, and nothing of it is done again.
"""

# pyright: basic
# (fsspec carries too few types for strict checking)
from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from kdscale.core.redaction import redacted
from kdscale.core.types import StorageError, refuse_secret

T = TypeVar("T")
P = ParamSpec("P")
logger = logging.getLogger(__name__)
PASSING = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
WAIT_S, LOOK_EVERY_S = 300.0, 2.0
REFUSALS = {"botocore.exceptions.BotoCoreError", "google.auth.exceptions.GoogleAuthError"}


def _told(method: Callable[Concatenate[Storage, P], T]) -> Callable[Concatenate[Storage, P], T]:
    """Puts in words what object stores' clients raise that is no OSError, as for credentials."""

    @wraps(method)
    def call(self: Storage, *args: P.args, **options: P.kwargs) -> T:
        """Calls the method."""
        try:
            return method(self, *args, **options)
        except Exception as error:
            kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
            if not kinds & REFUSALS:
                raise
            advice = "see that its address is right and answers"
            if "credential" in str(error).lower():
                advice = "give them as its own tools take them (environment, profile or role)"
            raise StorageError(
                f"cannot reach {self.root}: {error}; {advice}, or give another --storage"
            ) from error

    return call


class Storage:
    """A root directory on a local disk or an object store.

    Args:
        root: A path or fsspec URL (`/data/runs`, `~/runs`, `s3://bucket/runs`).

    Raises:
        StorageError: No filesystem of that kind is known or installed.
        SecretInUrl: The URL holds a password, which all that names a file would repeat.
    """

    def __init__(self, root: str) -> None:
        refuse_secret("--storage", root)
        is_url = "://" in root
        self.root = root.rstrip("/") if is_url else os.path.abspath(os.path.expanduser(root))
        try:
            self.fs, self._base = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot use {root} as storage: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    def path(self, *parts: str) -> str:
        """Returns the filesystem's own path of something below the root."""
        return "/".join([self._base, *parts])

    def url(self, *parts: str) -> str:
        """Returns a path or URL that any fsspec user can open."""
        return "/".join([self.root, *parts])

    @_told
    def exists(self, *parts: str) -> bool:
        """Tells whether a file or directory exists."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(*parts)))

    def check_made(self, command: str) -> None:
        """Refuses a storage in which there is nothing to be read.

        Args:
            command: What would make it, for the error.

        Raises:
            StorageError: It does not exist, or is empty.
        """
        if not self.names():  # an object store's prefix exists when anything lies below it
            found = "is empty" if self.exists() else "does not exist"
            raise StorageError(
                f"storage {self.root} {found}: {command} makes it; or name another by --storage"
            )

    def names(self, *parts: str) -> list[str]:
        """Lists the base names in a directory, sorted; an absent one is empty."""
        return sorted(_base(str(path)) for path in self._listed(parts, detail=False))

    def folders(self, *parts: str) -> list[str]:
        """Lists the directories in a directory, sorted; neither hidden ones nor files."""
        found = self._listed(parts, detail=True)
        names = (_base(entry["name"]) for entry in found if entry["type"] != "file")
        return sorted(name for name in names if not name.startswith("."))

    def sizes(self, *parts: str) -> dict[str, int]:
        """Returns {base name: bytes} of the files in a directory; an absent one is empty."""
        files = [e for e in self._listed(parts, detail=True) if e["type"] == "file"]
        return {_base(entry["name"]): int(entry["size"]) for entry in files}

    @_told
    def _listed(self, parts: tuple[str, ...], *, detail: bool) -> list[Any]:
        """Lists a directory as the filesystem does: its paths, or all that is known of them."""
        self.fs.invalidate_cache()
        try:
            return self.fs.ls(self.path(*parts), detail=detail)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.url(*parts)}: {error}") from error

    @_told
    def read(self, *parts: str) -> bytes:
        """Reads a whole file."""
        try:
            return self.fs.cat_file(self.path(*parts))
        except FileNotFoundError as error:
            raise StorageError(f"{self.url(*parts)} does not exist") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.url(*parts)}: {error}") from error

    @_told
    def write(self, data: bytes, *parts: str) -> None:
        """Writes a whole file so that a reader sees all of it or nothing."""
        target = self.path(*parts)
        try:
            if self.is_local:
                self._patiently(lambda: _write_local(Path(target), data))
            else:
                self.fs.pipe_file(target, data)
        except OSError as error:
            raise _unwritable(self.url(*parts), error) from error

    def read_json(self, *parts: str) -> Any:
        """Reads a JSON document."""
        return json.loads(self.read(*parts))

    def write_json(self, document: Any, *parts: str) -> None:
        """Writes a JSON document."""
        self.write(json.dumps(document, indent=2, sort_keys=True).encode(), *parts)

    def put_directory(self, source: str, *parts: str) -> None:
        """Copies a local directory's files to below the root."""
        for file in sorted(Path(source).rglob("*")):
            if file.is_file():
                self.write(file.read_bytes(), *parts, *file.relative_to(source).parts)

    @contextmanager
    def local_directory(self, *parts: str) -> Generator[str]:
        """Yields a local path with a directory's content, downloaded where it is remote."""
        if self.is_local:
            yield self.path(*parts)
            return
        with tempfile.TemporaryDirectory() as target:
            self.fs.get(self.path(*parts) + "/", target + "/", recursive=True)
            yield target

    @contextmanager
    def local_file(self, *parts: str) -> Generator[Path]:
        """Yields where to write a file that is too large for memory.

        What lies there when the block ends is in the storage, whole; after an error nothing is.
        """
        target = self.path(*parts)
        try:
            beside = Path(target).parent if self.is_local else None
            if beside is not None:
                beside.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=beside) as folder:
                written = Path(folder, parts[-1])
                yield written
                if self.is_local:
                    os.replace(written, target)
                else:
                    self.fs.put_file(str(written), target)
        except OSError as error:
            raise _unwritable(self.url(*parts), error) from error

    @_told
    def usage(self, *parts: str) -> tuple[int, float]:
        """Returns the bytes of all files in a directory, and when the newest was written.

        Returns:
            Bytes, and seconds since the epoch; zeros where there is no file.
        """
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.path(*parts), detail=True).values()
        except FileNotFoundError:
            return 0, 0.0
        except OSError as error:
            raise StorageError(f"cannot list {self.url(*parts)}: {error}") from error
        times = [_written(info) for info in found]
        return sum(info["size"] or 0 for info in found), max(times, default=0.0)

    @_told
    def remove(self, *parts: str) -> None:
        """Removes a file or a whole directory; an absent one is no error."""
        if self.exists(*parts):
            with suppress(FileNotFoundError):  # another process may be quicker
                self._patiently(lambda: self.fs.rm(self.path(*parts), recursive=True))

    @_told
    def create(self, data: bytes, *parts: str) -> bool:
        """Creates a file if absent and returns whether it did.

        In one step on a local disk and where the object store knows `If-None-Match`. Another
        may let two that create at once both believe that they did: see `Lease.acquire`.
        """
        target = self.path(*parts)
        if not self.is_local and self.exists(*parts):
            return False
        try:
            self._patiently(lambda: self.fs.makedirs(self.fs._parent(target), exist_ok=True))
            with self._patiently(lambda: self.fs.open(target, "xb")) as file:
                file.write(data)
        except FileExistsError:
            return False
        except ValueError:  # a filesystem without exclusive creation
            return self._create_where_none_is_seen(data, *parts)
        except OSError as error:
            if self.is_local:
                raise _unwritable(self.url(*parts), error) from error
            if error.errno == errno.ENOSYS:  # a server that refuses `If-None-Match`
                return self._create_where_none_is_seen(data, *parts)
            if self.exists(*parts):  # not every server's refusal is told as FileExistsError
                return False
            raise _unwritable(self.url(*parts), error) from error
        return True

    def _patiently(self, act: Callable[[], T]) -> T:
        """Does something again for `WAIT_S` while the disk refuses for a reason that may pass.

        Object stores' clients have their own patience.
        """
        deadline = time.monotonic() + (WAIT_S if self.is_local else 0.0)
        warned = False
        while True:
            try:
                return act()
            except OSError as error:
                if error.errno not in PASSING or time.monotonic() >= deadline:
                    raise
                if not warned:
                    logger.warning("%s: trying again for %.0f minutes", error, WAIT_S / 60)
                warned = True
                time.sleep(LOOK_EVERY_S)

    def _create_where_none_is_seen(self, data: bytes, *parts: str) -> bool:
        """Creates a file in two steps, between which another process may do so."""
        if self.exists(*parts):
            return False
        self.write(data, *parts)
        return True


def _base(path: str) -> str:
    """Returns the last part of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _written(info: dict[str, Any]) -> float:
    """Returns when a file was written, from what its filesystem says of it."""
    found = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
    return found.timestamp() if isinstance(found, datetime) else float(found)


def _unwritable(url: str, error: OSError) -> StorageError:
    """Words the error for a place that cannot be written to."""
    return StorageError(f"cannot write {url}: {error}; free it, or choose another --storage")


def _write_local(target: Path, data: bytes) -> None:
    """Writes beside the target, then renames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def all_stages(storage: Storage) -> list[StageStore]:
    """Returns every stage that has been begun, by kind and key."""
    return [
        StageStore(storage, kind, key)
        for kind in storage.folders("stages")
        for key in storage.folders("stages", kind)
    ]


class StageStore:
    """One stage's directory.

    Args:
        storage: Where stages live.
        kind: Stage kind.
        key: Content key.
    """

    def __init__(self, storage: Storage, kind: str, key: str) -> None:
        self.storage, self.kind, self.key = storage, kind, key
        self.parts = ("stages", kind, key)

    def is_done(self) -> bool:
        """Tells whether the stage is finished."""
        return self.storage.exists(*self.parts, "DONE")

    def has_started(self) -> bool:
        """Tells whether anything has been written for the stage."""
        return self.is_done() or self.storage.exists(*self.parts, "journal")

    def record(self) -> dict[str, Any]:
        """Reads `stage.json`."""
        return self.storage.read_json(*self.parts, "stage.json")

    def fail(self, message: str, *, final: bool) -> None:
        """Notes why an attempt has ended.

        Args:
            message: For people.
            final: Whether another attempt would end in the same way.
        """
        note = {"message": redacted(message), "final": final, "time": time.time()}
        self.storage.write_json(note, *self.parts, "FAILED")

    def failure(self) -> dict[str, Any] | None:
        """Returns what `fail` has noted of the last attempt, None where it has not failed."""
        if self.is_done() or not self.storage.exists(*self.parts, "FAILED"):
            return None
        return self.storage.read_json(*self.parts, "FAILED")

    def forget_failure(self) -> None:
        """Takes the note away, as a new attempt begins."""
        self.storage.remove(*self.parts, "FAILED")

    def finish(self, record: dict[str, Any]) -> None:
        """Writes `stage.json`, marks the stage done, and drops the checkpoints, in this order."""
        self.storage.write_json(record, *self.parts, "stage.json")
        self.storage.write(b"", *self.parts, "DONE")
        self.storage.remove(*self.parts, "checkpoints")

    def reopen(self) -> None:
        """Lets a finished stage be run again, by whoever holds its lease."""
        self.storage.remove(*self.parts, "DONE")

    def url(self, *parts: str) -> str:
        """Returns the URL of something in the stage's directory."""
        return self.storage.url(*self.parts, *parts)
