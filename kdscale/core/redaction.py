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

_URL = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+(?:[/?#]|$))[^@\s]*@")  # a port is none
_KEY_AS_USER = re.compile(r"(?:gs|gcs|s3a?|https?)://[^/\s]*@")  # nobody logs in there by name
_PARAMETER = re.compile(r"([?&;#][^=&;#/\s]+=)[^&;#\s]*")
_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_STRING|API_?KEY|(?:^|_)(?:KEYS?|PASS)(?:_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8  # of a value that is looked for: "0" or "true" is no secret
_SECRET = re.compile(r"key|token|secret|pass|pwd|sig|cred|auth", re.IGNORECASE)


def redacted(text: str) -> str:
    """Hides users, passwords and parameters in a text's URLs, and the environment's secrets."""
    return without_secrets(text, secret_values())


def holds_secret(text: str) -> bool:
    """Tells whether a URL holds a password, or a parameter that is called like one."""
    urls: list[str] = _URL.findall(text)
    names = [name for url in urls for name in _PARAMETER.findall(url)]
    keys = any(_PASSWORD.search(url) or _KEY_AS_USER.match(url) for url in urls)
    return keys or any(map(_SECRET.search, names))


def secret_values() -> list[str]:
    """Returns the values of environment variables whose names say that they are secret.

    Of fsspec's variables that hold JSON (`FSSPEC_HTTP`), the values whose names say so in it.
    """
    named = [value for name, value in os.environ.items() if _NAME.search(name)]
    for name, value in os.environ.items():
        if name.startswith("FSSPEC_"):
            with suppress(ValueError):
                named += _secrets_in(json.loads(value))
    return sorted({value for value in named if len(value) >= _SHORTEST}, key=len, reverse=True)


def _secrets_in(found: Any, *, named: bool = False) -> list[str]:
    """Returns the texts in JSON that have, or lie below, a name that says that they are secret."""
    if isinstance(found, dict):
        parts = [
            _secrets_in(value, named=named or bool(_SECRET.search(name)))
            for name, value in cast("dict[str, Any]", found).items()
        ]
        return [text for part in parts for text in part]
    return [found, *found.split()] if named and isinstance(found, str) else []


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Hides users, passwords and parameters in the URLs of a text, and the given values."""
    text = _URL.sub(_without_parts, text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _without_parts(url: re.Match[str]) -> str:
    """Hides what may be secret in a URL."""
    return _PARAMETER.sub(r"\1***", _USER.sub("***@", _PASSWORD.sub("***@", url[0])))
