"""Secrets: hidden in all that is printed or kept, refused where a URL that holds one is kept.

A URL's password stands in front of the host (`s3://key:secret@bucket`), or in a parameter behind
the path (`?token=...`, the signature of a signed URL).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import quote, quote_plus

_URL = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+(?:[/?#]|$))[^@\s]*@")  # a port is none
_KEY_AS_USER = re.compile(r"(?:gs|gcs|s3a?|https?)://[^/\s]*@")  # nobody logs in there by name
_PARAMETER = re.compile(r"([?&;#][^=&;#/\s]+=)[^&;#\s]*")
_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|API_?KEY"
    r"|(?:^|_)(?:KEYS?|PASS)(?:_|$)|_PWD(?:_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8  # of a value that is looked for: "0" or "true" is no secret
_SECRET = re.compile(r"key|token|secret|pass|pwd|sig|cred|auth", re.IGNORECASE)


def redacted(text: str) -> str:
    """Hides users, passwords and parameters in a text's URLs, and the environment's secrets."""
    return without_secrets(text, secret_values())


def holds_secret(text: str) -> bool:
    """Tells whether a URL holds a password, a key as user, or a parameter that is called like one.

    Only object stores and web servers are taken to get a key as user.
    """
    urls: list[str] = _URL.findall(text)
    names = [name for url in urls for name in _PARAMETER.findall(url)]
    keys = any(_PASSWORD.search(url) or _KEY_AS_USER.match(url) for url in urls)
    return keys or any(map(_SECRET.search, names))


def secret_values() -> list[str]:
    """Returns the values of environment variables whose names say that they are secret.

    Of variables that hold JSON, fsspec's (`FSSPEC_HTTP`) among them, the values whose names say so
    in it. A value is given as it is and as messages write it: a line alone, quoted, escaped.
    """
    named = [value for name, value in os.environ.items() if _is_secret(name, value)]
    for name, value in os.environ.items():
        if name.startswith("FSSPEC_") or _is_secret(name, value):
            with suppress(ValueError):
                named += _secrets_in(json.loads(value))
    found = {form for value in named for form in _forms(value) if len(form) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)


def _forms(value: str) -> list[str]:
    """Returns how a value may be written: whole, its lines, as Python, JSON and URLs write it."""
    whole = value.strip()
    broken = whole.replace("\\n", "\n")  # keys of several lines are often written in one
    plain = [value, whole, broken, *(line.strip() for line in broken.splitlines())]
    escaped = [
        form for text in (value, whole) for form in (repr(text)[1:-1], json.dumps(text)[1:-1])
    ]
    quoted = [quote(whole), quote(whole, safe=""), quote_plus(whole)]
    lower = [re.sub("%..", lambda found: found[0].lower(), text) for text in quoted]
    return [*plain, *escaped, repr(whole.encode(errors="surrogateescape"))[2:-1], *quoted, *lower]


def _is_secret(name: str, value: str) -> bool:
    """Tells whether a variable is called like a secret; a working directory's `_PWD` is none."""
    return bool(_NAME.search(name)) and not (name.endswith("_PWD") and value.startswith("/"))


def _secrets_in(found: Any, *, named: bool = False) -> list[str]:
    """Returns the texts in JSON that have, or lie below, a name that says that they are secret."""
    parts: list[list[str]] = []
    if isinstance(found, dict):
        fields = cast("dict[str, Any]", found).items()
        parts = [
            _secrets_in(value, named=named or bool(_SECRET.search(name))) for name, value in fields
        ]
    elif isinstance(found, list):
        parts = [_secrets_in(value, named=named) for value in cast("list[Any]", found)]
    elif named and isinstance(found, str):
        parts = [[found, *found.split()]]
    return [text for part in parts for text in part]


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Hides users, passwords and parameters in the URLs of a text, and the given values."""
    text = _URL.sub(_without_parts, text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _without_parts(url: re.Match[str]) -> str:
    """Hides what may be secret in a URL."""
    return _PARAMETER.sub(r"\1***", _USER.sub("***@", _PASSWORD.sub("***@", url[0])))
