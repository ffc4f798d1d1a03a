"""The report of sweeps: trials, teachers and tables, with n, chance and interval of every score.

Reads plans and the stage store; needs neither torch nor Ray. What is not finished is said to be
so, never counted as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from kdscale.analysis.stats import Interval
from kdscale.core.config import STAGE_WEIGHTS, Distill, TowerSpec
from kdscale.core.trained import student_key
from kdscale.core.types import unknown_name
from kdscale.core.zero_shot_config import Gate
from kdscale.sweep.cka_outcomes import CkaRow, cka_rows
from kdscale.sweep.controls import controls_of, is_baseline
from kdscale.sweep.grid import Sweep
from kdscale.sweep.kept import early_students
from kdscale.sweep.naming import label
from kdscale.sweep.outcomes import (
    DONE,
    LEVEL,
    NOT_FINISHED,
    Outcome,
    Predictions,
    Row,
    TeacherRow,
    TrialRow,
    compare,
    mean_interval,
    read_outcome,
)
from kdscale.sweep.plan import Plan, PlannedTrial
from kdscale.sweep.search_outcomes import SearchTable, search_tables
from kdscale.sweep.vlm_outcomes import VlmRow, vlm_rows


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table: the mean of its finished trials.

    Attributes:
        state: `done` where all trials are, whether they have the value or not.
        num_done: Trials that have the value.
        interval: Of an accuracy or of one difference; it covers the choice of images, not of seeds.
    """

    state: str
    value: float | None
    interval: Interval | None
    num_done: int
    num_trials: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """A sweep's trials by two recipe fields."""

    sweep: str
    rows: str
    columns: str
    value: str
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores of one or several sweeps.

    Attributes:
        storage: Root of the stage store.
        command: What runs the unfinished stages.
        warnings: What could not be reported, and why.
        comparisons: Of trials' towers with others, one for each set of images.
        outcomes: {key: what the stage's directory holds}.
    """

    scale: str
    storage: str
    command: str
    trials: tuple[TrialRow, ...]
    teachers: tuple[TeacherRow, ...]
    tables: tuple[Table, ...]
    warnings: tuple[str, ...]
    vlms: tuple[VlmRow, ...] = ()
    comparisons: tuple[CkaRow, ...] = ()
    searches: tuple[SearchTable, ...] = ()
    outcomes: dict[str, Outcome] = field(repr=False)

    @property
    def num_done(self) -> int:
        """Finished stages."""
        return sum(outcome.done for outcome in self._whole)

    @property
    def _whole(self) -> list[Outcome]:
        """The outcomes of stages at their end, one each."""
        return [outcome for outcome in self.outcomes.values() if outcome.epoch is None]

    def of(self, sweep: str) -> list[TrialRow]:
        """Returns one sweep's trials."""
        return [row for row in self.trials if row.sweep == sweep]

    def compared(self, sweep: str) -> list[CkaRow]:
        """Returns one sweep's comparisons."""
        return [row for row in self.comparisons if row.sweep == sweep]

    def message(self) -> str:
        """Says how much is finished, and what to run for the rest."""
        done, total = self.num_done, len(self._whole)
        if done == total:
            return f"All {total} stages are finished."
        ends = [row.has_ended for table in self.searches for row in table.rows]
        to_choose = sum(table.num_left for table in self.searches)
        if ends and all(ends) and not to_choose and len(ends) == len(self.trials + self.vlms):
            return f"{done} of {total} stages are finished; the others were stopped early."
        if done == 0:
            return f"Nothing is finished yet (0 of {total} stages). Run: {self.command}"
        return f"{done} of {total} stages are finished. For the rest run: {self.command}"

    def verdict(self, sweep: str) -> str:
        """Counts the trials above and below their control; empty where none is compared."""
        found = [row.difference.verdict for row in self.of(sweep) if row.difference is not None]
        if not found:
            return ""
        return (
            f"Trials compared with their control: {len(found)}. Interval of the difference "
            f"above zero: {found.count('better')}, below zero: {found.count('worse')}, "
            f"across zero: {found.count('undecided')}."
        )

    def document(self) -> dict[str, Any]:
        """Returns the report as JSON; what is not finished or not defined is null."""
        return _finite(
            {
                "scale": self.scale,
                "storage": self.storage,
                "message": self.message(),
                "command": self.command,
                "level": LEVEL,
                "stages_done": self.num_done,
                "stages_total": len(self._whole),
                "trials": [_row_document(row) for row in self.trials],
                "teachers": [_row_document(row) for row in self.teachers],
                "vlms": [row.document() for row in self.vlms],
                "cka": [row.document() for row in self.comparisons],
                "searches": [table.document() for table in self.searches],
                "tables": [_table_document(table) for table in self.tables],
                "warnings": self.warnings,
            }
        )


def _row_document(row: Row) -> dict[str, Any]:
    """Returns a row with its score's parts beside its own."""
    document, score = asdict(row), row.score
    del document["score"]
    return document | {
        "zero_shot_top1": score and score.top1,
        "n": score and score.n,
        "chance": score and score.chance,
        "interval": score and asdict(score.interval),
        "interval_method": score and score.method,
    }


def _table_document(table: Table) -> dict[str, Any]:
    """Returns a table with its cells in a list."""
    cells = [
        {"row": row, "column": column, **asdict(cell)}
        for (row, column), cell in table.cells.items()
    ]
    return asdict(table) | {"cells": cells}


def _finite(value: Any) -> Any:
    """Replaces what JSON cannot hold: tuples by lists, NaN and infinities by null."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {str(key): _finite(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_report(plan: Plan, sweeps: Sequence[Sweep], *, command: str | None = None) -> Report:
    """Reads what the stages of a plan have left in storage.

    Args:
        plan: Trials and stages; what is finished is looked up anew.
        sweeps: Those of the plan's sweeps that are reported.
        command: What runs the unfinished stages, for the message.

    Raises:
        UnknownName: If a sweep's table or baseline names a field that recipes do not have.
    """
    names = {sweep.name for sweep in sweeps}
    chosen = [trial for trial in plan.trials if trial.sweep in names]
    distilled = [trial for trial in chosen if isinstance(trial.trial.recipe, Distill)]
    keys = dict.fromkeys(key for trial in chosen for key in trial.path)
    outcomes = {key: read_outcome(plan.stages[key], plan.storage) for key in keys}
    early = early_students(distilled, [plan.stages[key] for key in keys])
    outcomes |= {
        student_key(key, epoch): read_outcome(plan.stages[key], plan.storage, epoch)
        for key, epoch in early
    }
    warnings = list(dict.fromkeys([*plan.missing, *plan.notes]))
    trials: list[TrialRow] = []
    tables: list[Table] = []
    for sweep in sweeps:
        check_fields(sweep)
        planned = [trial for trial in distilled if trial.sweep == sweep.name]
        rows = [_trial_row(trial, planned, sweep, outcomes) for trial in planned]
        tables.append(_table(sweep, rows, outcomes))
        warnings += _warnings(sweep, rows)
        trials += rows
    vlms = vlm_rows(chosen, outcomes, plan.scale)
    files = " ".join(f"sweeps/{sweep.name}.py" for sweep in sweeps)
    return Report(
        scale=plan.scale.name,
        storage=plan.storage.root,
        command=command or f"kdscale run {files} --scale {plan.scale.name}",
        trials=tuple(trials),
        teachers=tuple(_teacher_rows(distilled, outcomes)),
        tables=tuple(tables),
        vlms=vlms,
        comparisons=cka_rows(chosen, outcomes, vlms),
        searches=search_tables(plan, sweeps, outcomes),
        warnings=tuple(warnings),
        outcomes=outcomes,
    )


def check_fields(sweep: Sweep) -> None:
    """Raises UnknownName for a table or a baseline by fields that no recipe has."""
    for name in (sweep.table.rows, sweep.table.columns, *(sweep.baseline or {})):
        if name not in Distill.model_fields:
            raise unknown_name("recipe field", name, Distill.model_fields)


def _warnings(sweep: Sweep, rows: Sequence[TrialRow]) -> list[str]:
    """Says where a sweep asks for what its trials cannot give."""
    found: list[str] = []
    if sweep.baseline is not None and not any(row.is_baseline for row in rows):
        found.append(f"{sweep.name}: no trial is the baseline {sweep.baseline}; nothing to compare")
    metric = sweep.table.value
    done = [row for row in rows if row.state == DONE]
    if done and all(row.value(metric) is None for row in done):
        names = sorted({name for row in done for name in row.metrics} | {"difference", "seconds"})
        found.append(
            f"{sweep.name}: no finished trial has {metric!r}, which its table asks for; "
            f"they have {', '.join(names)}"
        )
    return found


def _trial_row(
    planned: PlannedTrial,
    trials: Sequence[PlannedTrial],
    sweep: Sweep,
    outcomes: Mapping[str, Outcome],
) -> TrialRow:
    """Reports one trial."""
    outcome = outcomes[planned.student]
    difference, notes = None, [outcome.note]
    if not is_baseline(planned, sweep):
        controls = {
            control.trial.name: answers
            for control in controls_of(planned, trials, sweep)
            if (answers := outcomes[control.student].predictions) is not None
        }
        if controls and outcome.predictions is not None:
            difference = compare(outcome.predictions, controls)
            if difference is None:
                notes.append(f"shares no image with its control, {' and '.join(controls)}")
    metrics = outcome.metrics
    if any(math.isnan(metrics.get(name, 0.0)) for name in ("cka_debiased", "cka_biased")):
        notes.append("CKA is undefined (NaN): too few images, or features that do not vary")
    return TrialRow(
        **_common(outcome, notes),
        name=planned.trial.name,
        sweep=sweep.name,
        chosen=dict(planned.trial.chosen),
        row=_label(planned, sweep.table.rows),
        column=_label(planned, sweep.table.columns),
        is_baseline=is_baseline(planned, sweep),
        cka_debiased=metrics.get("cka_debiased"),
        cka_biased=metrics.get("cka_biased"),
        difference=difference,
        metrics=metrics,
    )


def _common(outcome: Outcome, notes: Sequence[str]) -> dict[str, Any]:
    """Returns the fields that the rows of trials and teachers share."""
    return {
        "key": student_key(outcome.stage.key, outcome.epoch),
        "state": DONE if outcome.done else outcome.early or NOT_FINISHED,
        "step": outcome.last_step,
        "total_steps": outcome.stage.total_steps,
        "seconds": outcome.seconds,
        "score": outcome.score,
        "note": "; ".join(note for note in notes if note),
    }


def _label(planned: PlannedTrial, name: str) -> str:
    """Names a trial's choice of a field."""
    recipe = planned.trial.recipe
    value = planned.trial.chosen.get(name, label(getattr(recipe, name)))
    return f"no {name}" if value is None else str(value)


def _teacher_rows(
    trials: Sequence[PlannedTrial], outcomes: Mapping[str, Outcome]
) -> list[TeacherRow]:
    """Reports every teacher once, whether a stage trains it or not."""
    found: dict[str, tuple[TowerSpec, list[str]]] = {}
    for planned in trials:
        tower = outcomes[planned.key].stage.training.teacher
        if isinstance(tower, TowerSpec):
            roles = found.setdefault(tower.model_dump_json(), (tower, []))[1]
            roles.append(_label(planned, "teacher"))
    return [_teacher_row(tower, tuple(dict.fromkeys(roles)), outcomes)
            for tower, roles in found.values()]  # fmt: skip


def _teacher_row(
    tower: TowerSpec, roles: tuple[str, ...], outcomes: Mapping[str, Outcome]
) -> TeacherRow:
    """Reports one teacher."""
    given = tower.weights == "random"
    common: dict[str, Any] = {"key": None, "state": "random" if given else "pretrained"}
    loss = None
    gate = next((o for o in outcomes.values() if _is_gate_of(o, tower)), None)
    if gate is not None:
        common |= {"score": gate.score, "note": "" if gate.done else "has not passed its gate"}
    if tower.weights.startswith(STAGE_WEIGHTS):
        outcome = outcomes[tower.weights.rpartition("/")[2]]
        common, loss = _common(outcome, [outcome.note]), str(label(outcome.stage.training.loss))
    return TeacherRow(
        **common,
        name=tower.name,
        roles=roles,
        width=tower.width,
        patch_px=tower.patch_px,
        image_px=tower.image_px,
        tokenizer=tower.tokenizer,
        loss=loss,
        published_top1=None if given or loss else tower.facts.zero_shot_top1,
    )


def _is_gate_of(outcome: Outcome, tower: TowerSpec) -> bool:
    """Tells whether an outcome is that of a teacher's gate."""
    return isinstance(outcome.stage.recipe, Gate) and outcome.stage.recipe.tower == tower


def _table(sweep: Sweep, rows: Sequence[TrialRow], outcomes: Mapping[str, Outcome]) -> Table:
    """Arranges a sweep's trials."""
    groups: dict[tuple[str, str], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((row.row, row.column), []).append(row)
    metric = sweep.table.value
    return Table(
        sweep=sweep.name,
        rows=sweep.table.rows,
        columns=sweep.table.columns,
        value=metric,
        row_names=tuple(dict.fromkeys(row.row for row in rows)),
        column_names=tuple(dict.fromkeys(row.column for row in rows)),
        cells={place: _cell(group, metric, outcomes) for place, group in groups.items()},
    )


def _cell(rows: Sequence[TrialRow], metric: str, outcomes: Mapping[str, Outcome]) -> Cell:
    """Averages the trials of one cell that have the metric."""
    done = [row for row in rows if row.value(metric) is not None]
    values = [value for row in done if (value := row.value(metric)) is not None]
    interval = None
    if len(done) == 1:
        source = {"zero_shot_top1": done[0].score, "difference": done[0].difference}.get(metric)
        interval = source.interval if source else None
    elif metric == "zero_shot_top1" and done:
        answers = [outcomes[row.key].predictions for row in done if row.key is not None]
        interval = mean_interval([a for a in answers if isinstance(a, Predictions)])
    return Cell(
        state=DONE if all(row.state == DONE for row in rows) else NOT_FINISHED,
        value=sum(values) / len(values) if values else None,
        interval=interval,
        num_done=len(done),
        num_trials=len(rows),
    )
