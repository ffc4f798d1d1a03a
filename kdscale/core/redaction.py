"""Secrets: hidden in all that is printed or kept, refused where a URL that holds one is kept.

A URL's password stands in front of the host (`s3://key:secret@bucket`), or in a parameter behind
the path (`?token=...`, the signature of a signed URL).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_URL = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_PASSWORD = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@")
_PARAMETER = re.compile(r"([?&;#][^=&;#/\s]+=)[^&;#\s]*")
_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_SHORTEST = 8  # of a value that is looked for: "0" or "true" is no secret
_SECRET = re.compile(r"key|token|secret|pass|pwd|sig|cred|auth", re.IGNORECASE)


def redacted(text: str) -> str:
    """Hides users, passwords and the values of parameters in the URLs of a text."""
    return _URL.sub(lambda url: _PARAMETER.sub(r"\1***", _USER.sub("***@", url[0])), text)


def holds_secret(text: str) -> bool:
    """Tells whether a URL holds a password, or a parameter that is called like one."""
    urls: list[str] = _URL.findall(text)
    names = [name for url in urls for name in _PARAMETER.findall(url)]
    return any(map(_PASSWORD.search, urls)) or any(map(_SECRET.search, names))


def secret_values() -> list[str]:
    """Returns the values of environment variables whose names say that they are secret."""
    named = [value for name, value in os.environ.items() if _NAME.search(name)]
    return [value for value in named if len(value) >= _SHORTEST]


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Hides what `redacted` hides, and the given values."""
    text = redacted(text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
