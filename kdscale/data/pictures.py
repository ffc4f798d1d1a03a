"""Pictures on disk: which file belongs to a row, and what of it is stored in a shard."""

from __future__ import annotations

import hashlib
import io
import os
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from kdscale.core.types import DataError
from kdscale.data.captions import Captions, Row
from kdscale.data.samples import BadImage, decode

Finder = Callable[[Row], tuple[str, str | None]]

MAX_JPEG_PX = 65_500  # libjpeg's limit
ORIENTATION_TAG = 0x0112
_DIGEST = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9]+")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_BESIDE = (".json", ".jsonl", ".txt", ".tsv", ".csv", ".parquet", ".tar")
_SEVERAL = ""


def finder(captions: Captions, folder: str) -> Finder:
    """Makes the function that finds a row's image: (path within the folder, cause of failure).

    Raises:
        DataError: There is no such folder.
    """
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder of images {folder}")
    if captions.kind == "cc12m":
        return LinkIndex(folder, captions).find
    root = os.path.abspath(folder)

    def find(row: Row) -> tuple[str, str | None]:
        """Returns the path of a row's image below the folder, and what is wrong with it."""
        path = os.path.normpath(os.path.join(root, row.image))
        if not path.startswith(os.path.join(root, "")):
            return row.image, "outside_folder"
        if captions.kind == "conversations":
            path = _other_suffix(path)
        return path[len(os.path.join(root, "")) :], None

    return find


def _other_suffix(path: str) -> str:
    """Returns a picture's path with the suffix that it has on disk; OCR-VQA's lists say `.jpg`."""
    if os.path.isfile(path):
        return path
    stem = os.path.splitext(path)[0]
    return next((stem + s for s in _SUFFIXES if os.path.isfile(stem + s)), path)


class LinkIndex:
    """Finds the local copy of a link by the names that downloaders give.

    These are the MD5 or SHA-256 of the URL; the row number, zero-padded to any width, in a folder
    where most names are numbers; else the last part of the URL. A name that several files or
    several URLs share belongs to none of them.

    Args:
        folder: Is listed once, with all folders below it.
        rows: Rows whose `image` is a URL.
    """

    def __init__(self, folder: str, rows: Iterable[Row]) -> None:
        files = list(list_files(folder, ""))
        stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
        plain = [stem for stem in stems if not _DIGEST.fullmatch(stem)]
        self._numbered = 2 * sum(bool(_DIGITS.fullmatch(stem)) for stem in plain) > len(plain)
        self._paths: dict[str, str] = {}
        for file, stem in zip(files, stems, strict=True):
            name = self._name(file, stem)
            self._paths[name] = _SEVERAL if name in self._paths else file
        self._forget_shared(rows)

    def _name(self, file: str, stem: str) -> str:
        """Returns what a file is looked for by."""
        if _DIGEST.fullmatch(stem):
            return stem
        if self._numbered and _DIGITS.fullmatch(stem):
            return _numbered(int(stem))
        return os.path.basename(file)

    def _forget_shared(self, rows: Iterable[Row]) -> None:
        """Takes back the names that the URLs of several rows end in."""
        if all(name.startswith("#/") or _DIGEST.fullmatch(name) for name in self._paths):
            return
        owners: dict[str, str] = {}
        for row in rows:
            for name in _last_parts(row.image):
                if name in self._paths and owners.setdefault(name, row.image) != row.image:
                    self._paths[name] = _SEVERAL

    def find(self, row: Row) -> tuple[str, str | None]:
        """Returns a row's image, or the cause why it has none."""
        url = row.image.encode("utf-8", "surrogateescape")
        names = [hashlib.md5(url).hexdigest(), hashlib.sha256(url).hexdigest()]
        for name in [*names, _numbered(row.number), *_last_parts(row.image)]:
            if name in self._paths:
                path = self._paths[name]
                return path, "ambiguous_image" if path == _SEVERAL else None
        return "", "missing_image"


def list_files(folder: str, prefix: str) -> Iterator[str]:
    """Lists what may be an image in a folder and below, as sorted relative paths."""
    with os.scandir(os.path.join(folder, prefix)) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = os.path.join(prefix, entry.name)
        if entry.is_dir():
            yield from list_files(folder, path)
        elif not entry.name.lower().endswith(_BESIDE):
            yield path


def _numbered(number: int) -> str:
    """Returns what a row is looked for by its number; no file name holds the first character."""
    return f"#/{number}"


def _last_parts(url: str) -> list[str]:
    """Returns the last part of a URL without its query, as it is and unescaped."""
    part = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("/")[2]
    return [name for name in dict.fromkeys((part, urllib.parse.unquote(part))) if name]


@dataclass(frozen=True)
class Stored:
    """An image as it goes into a shard.

    Attributes:
        size: (width, height) of `jpg`.
        original_size: The same of the file, after turning it upright.
        kept: The file's own bytes were kept.
    """

    jpg: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]
    kept: bool


def store(data: bytes, px: int, quality: int, *, gif: bool = False) -> Stored:
    """Shrinks an image to `px` on its shorter side; a JPEG that needs no change keeps its bytes.

    Larger images, other formats and images that an orientation tag turns are encoded anew,
    upright.

    Args:
        data: A whole image file.
        px: Longest that the shorter side may be, in pixels.
        quality: JPEG quality, 1 to 100.
        gif: Take the first picture of a GIF, too.

    Raises:
        BadImage: Truncated, too large to be honest, or not an image.
    """
    image = decode(data, gif=gif)
    orientation = orientation_of(data)
    image = upright(image, orientation)
    height, width = image.shape[:2]
    is_small = min(height, width) <= px
    if is_small and orientation == 1 and data[:2] == b"\xff\xd8":
        return Stored(data, (width, height), (width, height), kept=True)
    if not is_small:
        scale = px / min(height, width)
        size = max(px, round(width * scale)), max(px, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if max(image.shape[:2]) > MAX_JPEG_PX:
        raise BadImage("too_long", f"{width} x {height} pixels, too long for a JPEG")
    jpg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")
    return Stored(jpg, (image.shape[1], image.shape[0]), (width, height), kept=False)


def orientation_of(data: bytes) -> int:
    """Reads the EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata raise anything, and say nothing about the picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(image: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Turns and mirrors (H, W, 3) pixels as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image
