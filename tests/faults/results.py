"""The results of rows: one JSON line each, so that a matrix goes on where it was broken off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults.check import CHECKS

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass(frozen=True)
class Row:
    """What came of one fault with one seed.

    Attributes:
        fault: Its name.
        seed: What its moment was drawn from.
        status: `passed`, `failed` or `not run`.
        moment: What was done, to what and when.
        checks: What is wrong, by check; empty texts where nothing is.
        why: Why it was not run, or could not be run to its end.
        runs: How often the command was given.
        repeated: Steps that were done again.
        seconds: From the first command to the last one's end.
    """

    fault: str
    seed: int
    status: str
    moment: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    why: str = ""
    runs: int = 0
    repeated: int = 0
    seconds: float = 0.0

    @property
    def trouble(self) -> str:
        """What is wrong, in words."""
        wrong = [f"{name}: {text}" for name, text in self.checks.items() if text]
        return "; ".join([*([self.why] if self.why else []), *wrong])


def verdict(checks: dict[str, str], why: str = "") -> str:
    """Returns the status of a row that was run: every check made, and nothing wrong."""
    whole = set(CHECKS) <= checks.keys() and not any(checks.values())
    return PASSED if whole and not why else FAILED


def read_rows(path: Path) -> dict[tuple[str, int], Row]:
    """Reads the last result of each row; a line that was cut off is none."""
    found: dict[tuple[str, int], Row] = {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        try:
            row = Row(**json.loads(line))
        except ValueError:
            continue
        found[row.fault, row.seed] = row
    return found


def append_row(path: Path, row: Row) -> None:
    """Adds a result."""
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + json.dumps(asdict(row)) + "\n")


def left_to_do(
    wanted: Iterable[tuple[str, int]], rows: dict[tuple[str, int], Row]
) -> list[tuple[str, int]]:
    """Returns the rows without a result; what was not run may be possible by now."""
    done = {key for key, row in rows.items() if row.status != NOT_RUN}
    return [key for key in wanted if key not in done]


def table(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """Returns a Markdown table, one line a fault.

    Args:
        rows: The newest result of each.
        titles: {fault: what it is}, in order.
    """
    header = "| fault | passed | command given | steps repeated | took | what went wrong |"
    lines = [header, "|---|---|---|---|---|---|"]
    for fault, title in titles.items():
        own = sorted((row for row in rows if row.fault == fault), key=lambda row: row.seed)
        lines.append(f"| {title} | " + " | ".join(_cells(own)) + " |")
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> list[str]:
    """Returns a line's cells but for the first."""
    run = [row for row in rows if row.status != NOT_RUN]
    trouble = dict.fromkeys(
        f"{row.status if row.status == NOT_RUN else f'seed {row.seed}'}: {row.trouble}"
        for row in rows
        if row.status != PASSED
    )
    words = "; ".join(trouble).replace("|", "/").replace("\n", " ")
    if not run:
        return ["-", "-", "-", "-", words or "not run yet"]
    passed = sum(row.status == PASSED for row in run)
    return [
        f"{passed} of {len(rows)}",
        _span([row.runs for row in run], " x"),
        _span([row.repeated for row in run]),
        _span([round(row.seconds) for row in run], " s"),
        words,
    ]


def _span(values: Sequence[int], unit: str = "") -> str:
    """Puts the least and the most in words."""
    least, most = min(values), max(values)
    return f"{least}{unit}" if least == most else f"{least}-{most}{unit}"


def write_block(page: Path, block: str) -> None:
    """Replaces what stands between the markers of a page; people's words stay.

    Raises:
        ValueError: The page has no such markers.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs the lines {BEGIN} and {END}, once each")
    own = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.S)
    page.write_text(own.sub(lambda _: f"{BEGIN}\n{block.strip()}\n{END}", text))
