"""Hides secrets in what is printed, kept or sent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

HIDDEN = "***"
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.I)
_SHORTEST = 8  # of a value that is looked for: "0" or "true" is no secret
_IN_QUERIES = re.compile(
    r"(?i)([?&](?:[\w-]*(?:token|secret|password|signature|credential|key)[\w-]*)=)[^&\s\"']+"
)


def redacted(text: str) -> str:
    """Hides user names and passwords in URLs, for what is printed or kept."""
    return re.sub(r"://[^/\s]*@", f"://{HIDDEN}@", text)


def secret_values() -> list[str]:
    """Returns the values of environment variables whose names say that they are secret."""
    named = [value for name, value in os.environ.items() if _SECRET_NAMES.search(name)]
    return [value for value in named if len(value) >= _SHORTEST]


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Hides what `redacted` hides, signatures in URLs, and the given values."""
    text = _IN_QUERIES.sub(rf"\1{HIDDEN}", redacted(text))
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
