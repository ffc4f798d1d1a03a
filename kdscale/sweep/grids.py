"""Tables of a report as words, the same for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdscale.analysis.stats import Interval
from kdscale.sweep.benchmark_outcomes import BenchmarkRow, counted, interval_of
from kdscale.sweep.cka_outcomes import CkaRow
from kdscale.sweep.outcomes import DONE, NOT_FINISHED, Row, TeacherRow, TrialRow
from kdscale.sweep.report import Cell, Table
from kdscale.sweep.vlm_outcomes import VlmRow

NONE = "–"
TRIALS_PER_GRID = 4
METRICS = {
    "zero_shot_top1": "Zero-shot top-1, %, with 95 % interval,",
    "difference": "Difference to the control, points,",
    "cka_debiased": "CKA with the teacher, debiased,",
    "cka_biased": "CKA with the teacher, biased,",
    "seconds": "Time in seconds",
}


@dataclass(frozen=True)
class Words:
    """A cell's text and its tone: `better`, `worse`, `muted`, or none."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Grid:
    """A table, the same for the terminal and for the page.

    Attributes:
        notes: Remarks on rows, below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[Words]]
    notes: list[str]


def trial_grid(rows: Sequence[TrialRow]) -> Grid:
    """Returns the table of a sweep's trials."""
    columns = ("trial", "top-1 %", "n", "chance %", "minus control", "CKA debiased")
    return Grid(
        title="Trials",
        columns=(*columns, "CKA biased", "steps", "time"),
        rows=[
            [
                Words(row.name),
                *_score(row),
                _difference(row),
                _cka(row, row.cka_debiased),
                _cka(row, row.cka_biased),
                *_effort(row),
            ]
            for row in rows
        ],
        notes=_notes(rows),
    )


def teacher_grid(rows: Sequence[TeacherRow]) -> Grid:
    """Returns the table of teachers and their towers."""
    tower = ("width", "patch", "pixels", "tokenizer", "loss")
    return Grid(
        title="Teachers",
        columns=("teacher", "top-1 %", "n", "chance %", *tower, "steps", "time"),
        rows=[
            [
                Words(f"{', '.join(row.roles)} ({row.name})"),
                *_score(row),
                Words(str(row.width)),
                Words(NONE if row.patch_px is None else str(row.patch_px)),
                Words(str(row.image_px)),
                Words(row.tokenizer),
                Words(row.loss or NONE),
                *_effort(row),
            ]
            for row in rows
        ],
        notes=_notes(rows),
    )


def vlms_grid(rows: Sequence[VlmRow]) -> Grid:
    """Returns a line for each VLM: what its benchmarks and its miniature questions come to."""
    columns = ("VLM", "average", "without image", "clear of blind and chance", "questions right %")
    return Grid(
        title="VLMs",
        columns=(*columns, "time"),
        rows=[[Words(row.name), *_vlm(row), Words(_duration(row.seconds))] for row in rows],
        notes=[],
    )


def _vlm(row: VlmRow) -> list[Words]:
    """Returns the cells for what a VLM comes to, or for the stage that it has come to."""
    compared = [found.sees for found in row.benchmarks if found.is_compared]
    asked = row.scores[0] if row.scores else None  # all questions come first
    seeing, blind = (
        Words(NONE if a is None else f"{a:.2f}") for a in (row.average, row.blind_average)
    )
    if row.state != DONE and row.average is None:
        seeing = Words(f"{row.state}: {row.stage}", "muted")
    return [
        seeing,
        blind,
        Words(f"{sum(compared)} of {len(compared)}" if compared else NONE),
        Words(f"{asked.accuracy:.1f} {_interval(asked.interval)}" if asked else NONE),
    ]


def vlm_grid(row: VlmRow) -> Grid:
    """Returns the table of one VLM's answers."""
    columns = ("questions", "right %", "without image %", "chance %", "n", "images")
    rows = [
        [
            Words(score.family),
            Words(
                f"{score.accuracy:.1f} {_interval(score.interval)}", "better" if score.sees else ""
            ),
            Words(f"{score.blind:.1f} {_interval(score.blind_interval)}"),
            Words(f"{score.chance:.1f}"),
            Words(f"{score.n:,}"),
            Words(f"{score.groups:,}"),
        ]
        for score in row.scores
    ]
    constant = [s.family for s in row.scores if s.constant_share == 100 and s.n > 1]
    notes = [f"gives one and the same answer to every question: {', '.join(constant)}"]
    if row.state != DONE:
        rows = [[Words(f"{row.state}: {row.stage}", "muted"), *([Words(NONE, "muted")] * 5)]]
    return Grid(
        title=f"VLM: {row.name}, {_duration(row.seconds)}" if row.scores else f"VLM: {row.name}",
        columns=columns,
        rows=rows,
        notes=[*(notes if constant else []), *([row.note] if row.note else [])],
    )


def benchmark_grid(row: VlmRow) -> Grid:
    """Returns the table of one VLM's benchmarks."""
    columns = ("benchmark", "score", "without image", "minus blind", "chance", "n")
    columns = (*columns, "same answer %", "unread %")
    rows = [[Words(found.benchmark), *_benchmark(found)] for found in row.benchmarks]
    compared = [found.sees for found in row.benchmarks if found.is_compared]
    notes = [f"clear of blind and chance: {sum(compared)} of {len(compared)}"] if compared else []
    if row.average is not None:
        blind = "" if row.blind_average is None else f", without images {row.blind_average:.2f}"
        notes.append(f"average of the 16, MME-P / 20: {row.average:.2f}{blind}")
    limited = [found.benchmark for found in row.benchmarks if found.limited]
    notes += [f"first questions only: {', '.join(limited)}"] if limited else []
    notes += [f"{found.benchmark}: {found.note}" for found in row.benchmarks if found.note]
    mode = row.benchmarks[0].mode
    return Grid(f"Benchmarks of {row.name}, scored by {mode} rules", columns, rows, notes)


def _benchmark(found: BenchmarkRow) -> list[Words]:
    """Returns the cells of a benchmark's scores."""
    seen, blind = found.score, found.blind
    if seen is None:
        state = "no score" if found.note else NOT_FINISHED
        return [Words(state, "muted"), *([Words(NONE, "muted")] * 6)]
    constant = f"{100 * seen.constant_share:.0f}{'!' if seen.constant_share > 0.95 else ''}"
    light, dark = (
        NONE
        if part is None
        else f"{part.value:.1f} {_interval(interval_of(found.benchmark, part))}"
        for part in (seen, blind)
    )
    return [
        Words(light, "better" if found.sees else ""),
        Words(dark),
        _minus_blind(found),
        Words(f"{seen.chance:.1f}"),
        Words(counted(found.benchmark, found.mode, seen)),
        Words(constant),
        Words(f"{100 * seen.unparsed_share:.0f}"),
    ]


def cka_grids(rows: Sequence[CkaRow]) -> list[Grid]:
    """Returns the tables of a sweep's comparisons: sets of images by trials, tap by tap."""
    found: list[Grid] = []
    for tap in dict.fromkeys(row.tap for row in rows):
        own = [row for row in rows if row.tap == tap]
        pairs = list(dict.fromkeys((row.trial_key, row.trial, row.b) for row in own))
        for start in range(0, len(pairs), TRIALS_PER_GRID):
            found.append(_cka_grid(own, pairs[start : start + TRIALS_PER_GRID], tap))
    return found


def _cka_grid(rows: Sequence[CkaRow], pairs: Sequence[tuple[str, str, str]], tap: str) -> Grid:
    """Returns one table of comparisons."""
    cells = {(row.images, (row.trial_key, row.trial, row.b)): row for row in rows}
    lines: list[list[Words]] = []
    for images in dict.fromkeys(row.images for row in rows):
        shown = [cells.get((images, pair)) for pair in pairs]
        sizes = dict.fromkeys(f"{row.n:,} images" for row in shown if row is not None and row.n)
        size = Words(" or ".join(sizes) or NONE)
        lines.append([Words(images), size, *map(_comparison, shown)])
    notes = [f"{row.trial}, {row.images}: {row.note}" for row in rows if row.note]
    return Grid(
        title=f"CKA by {tap}: debiased (biased), then the benchmark's score",
        columns=("images of", "n", *(f"{trial} / {other}" for _, trial, other in pairs)),
        rows=lines,
        notes=list(dict.fromkeys(notes)),
    )


def _comparison(row: CkaRow | None) -> Words:
    """Returns the cell of a comparison."""
    if row is None or row.state != DONE:
        return Words(NONE if row is None else row.state, "muted")
    debiased, biased = (
        "undefined" if value is None else f"{value:.3f}" for value in (row.debiased, row.biased)
    )
    return Words(f"{debiased} ({biased})" + ("" if row.score is None else f", {row.score:.1f}"))


def _minus_blind(found: BenchmarkRow) -> Words:
    """Returns the cell for what the images add."""
    paired = found.minus_blind
    if paired is None:
        return Words(NONE)
    low, high = paired.interval.low, paired.interval.high
    tone = "better" if low > 0 else "worse" if high < 0 else ""
    return Words(f"{paired.difference:+.1f} [{low:+.1f}, {high:+.1f}]", tone)


def pivot_grid(table: Table, rows: Sequence[TrialRow]) -> Grid:
    """Returns a sweep's own table, with n and chance of its scores in the title.

    Args:
        table: The table.
        rows: The sweep's trials.
    """
    title = f"{METRICS.get(table.value, table.value)} by {table.rows} and {table.columns}"
    scores = [row.score for row in rows if row.score is not None]
    if table.value in ("zero_shot_top1", "difference") and scores:
        sizes = " or ".join(f"{n:,}" for n in sorted({score.n for score in scores}))
        chances = " or ".join(f"{c:.1f}" for c in sorted({score.chance for score in scores}))
        title += f" (n = {sizes} images, chance {chances} %)"
    return Grid(
        title=title,
        columns=(table.rows, *table.column_names),
        rows=[
            [Words(row), *(_cell(table.cells.get((row, column))) for column in table.column_names)]
            for row in table.row_names
        ],
        notes=[],
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    """Collects remarks."""
    return [f"{row.name}: {row.note}" for row in rows if row.note]


def _score(row: Row) -> list[Words]:
    """Returns the cells for accuracy, n and chance."""
    score = row.score
    if score is not None:
        value = Words(f"{score.top1:.1f} {_interval(score.interval)}")
        return [value, Words(f"{score.n:,}"), Words(f"{score.chance:.1f}")]
    words = "no score" if row.state == DONE else row.state
    if isinstance(row, TeacherRow) and row.published_top1 is not None:
        words = f"{row.published_top1:.1f} published"
    return [Words(words, "muted"), Words(NONE, "muted"), Words(NONE, "muted")]


def _interval(interval: Interval | None) -> str:
    """Writes an interval."""
    if interval is None or not math.isfinite(interval.low + interval.high):
        return "[no interval]"
    return f"[{interval.low:.1f}, {interval.high:.1f}]"


def _difference(row: TrialRow) -> Words:
    """Returns the cell for the difference to the control."""
    found = row.difference
    if found is None:
        return Words("control" if row.is_baseline else NONE, "muted")
    interval = found.interval
    if not math.isfinite(interval.low + interval.high):
        return Words(f"{found.points:+.1f} [no interval]")
    words = f"{found.points:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
    return Words(words, "" if found.verdict == "undecided" else found.verdict)


def _cka(row: Row, value: float | None) -> Words:
    """Returns the cell for a CKA."""
    if value is None:
        return Words(NONE if row.state == DONE else row.state, "muted")
    return Words(f"{value:.3f}") if math.isfinite(value) else Words("undefined", "muted")


def _effort(row: Row) -> list[Words]:
    """Returns the cells for steps and time."""
    total = NONE if row.total_steps is None else f"{row.total_steps:,}"
    steps = total if row.state == DONE or row.key is None else f"{row.step or 0:,} of {total}"
    return [Words(steps), Words(_duration(row.seconds))]


def _duration(seconds: float | None) -> str:
    """Writes a duration in the unit that suits it."""
    if seconds is None:
        return NONE
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _cell(cell: Cell | None) -> Words:
    """Returns a cell of a sweep's own table."""
    if cell is None:
        return Words("")
    if cell.value is None:
        return Words(NONE if cell.state == DONE else cell.state, "muted")
    words = f"{cell.value:.1f}" if cell.interval else f"{cell.value:.3g}"
    if cell.interval:
        words += f" {_interval(cell.interval)}"
    if cell.num_trials > 1:
        words += f", mean of {cell.num_done}"
    if cell.num_done < cell.num_trials:
        words += f" of {cell.num_trials}"
    return Words(words)
