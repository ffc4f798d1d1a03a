"""Secrets in URLs: hidden in all that is printed or kept, refused where a URL itself is kept.

A password stands in front of the host (`s3://key:secret@bucket`), or in a parameter behind the path
(`?token=...`, the signature of a signed URL).
"""

from __future__ import annotations

import re

_URL = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_PASSWORD = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@")
_PARAMETER = re.compile(r"([?&;#][^=&;#/\s]+=)[^&;#\s]*")
_SECRET = re.compile(r"key|token|secret|pass|pwd|sig|cred|auth", re.IGNORECASE)


def redacted(text: str) -> str:
    """Hides users, passwords and the values of parameters in the URLs of a text."""
    return _URL.sub(lambda url: _PARAMETER.sub(r"\1***", _USER.sub("***@", url[0])), text)


def holds_secret(text: str) -> bool:
    """Tells whether a URL holds a password, or a parameter that is called like one."""
    urls: list[str] = _URL.findall(text)
    names = [name for url in urls for name in _PARAMETER.findall(url)]
    return any(map(_PASSWORD.search, urls)) or any(map(_SECRET.search, names))
