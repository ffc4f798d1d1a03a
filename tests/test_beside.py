"""Results beside the paper's tables, and verdicts on its claims, on numbers made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdscale.analysis.stats import Interval
from kdscale.cli import app, load_sweep
from kdscale.core import catalog, vlm_recipes
from kdscale.core.config import Distill
from kdscale.core.scale import MINI
from kdscale.core.storage import Storage
from kdscale.losses.recipes import RECIPES
from kdscale.sweep.beside import Beside, beside, said
from kdscale.sweep.beside_grids import (
    beside_grid,
    claim_grid,
    claims_csv,
    table_csv,
    table_tex,
    tex,
)
from kdscale.sweep.beside_runs import Measured
from kdscale.sweep.claims import CLAIMS
from kdscale.sweep.measure import departures, measured
from kdscale.sweep.paper_figures import gap_figure, long_figure, table_named
from kdscale.sweep.paper_notes import NOTES, Marks
from kdscale.sweep.paper_numbers import paper_numbers
from kdscale.sweep.paper_report import DEFAULTS, write_paper
from kdscale.sweep.paper_tables import PaperTable, paper_tables
from kdscale.sweep.places import (
    PAPER_NAMES,
    Place,
    student,
)
from kdscale.sweep.plan import make_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.verdicts import Verdict

SWEEP = """
from kdscale import Distill, Pivot, Sweep
taught = Distill(student="vit_t16", teacher="clip_b16", zero_shot=None)
sweep = Sweep(name="little", stages=[taught], scale="mini")
"""
A, B, C = (student("imagenet", name) for name in ("CLIP-ViT-B", "CLIP-ViT-L", "SigLIP-so400m"))
ROLES = {name: role for role, name in PAPER_NAMES.items() if name}


def table(name: str) -> PaperTable:
    """One of the paper's tables."""
    return next(found for found in paper_tables() if found.name == name)


def one(teacher: str = "clip_b16", **fields: object) -> Measured:
    """A student's accuracy on ImageNet."""
    own = Measured(
        framework=None, llm=None, student_or_encoder="vit_t16", teacher=teacher, loss="clip_kd",
        data="cc12m", epochs=32, seed=0, metric="imagenet", value=36.0, n=50_000,
        interval=Interval(35.5, 36.5), chance=0.1, constant=False,
    )  # fmt: skip
    return replace(own, **fields)  # type: ignore[arg-type]


def all_printed(*seeds: int) -> list[Measured]:
    """The paper's numbers as if they were ours."""
    found: list[Measured] = []
    fields = ("framework", "llm", "student_or_encoder", "teacher", "loss", "data")
    for place, (estimate,) in paper_numbers().items():
        names = (place.framework, place.llm, place.model, place.teacher, place.loss, place.data)
        roles = [None if name is None else ROLES.get(name, "vit_t16 of a.pt") for name in names]
        half = 1.959964 * (estimate.standard_error or math.nan)
        for seed in seeds:
            found.append(
                Measured(
                    **dict(zip(fields, roles, strict=True)),  # type: ignore[arg-type]
                    **{name: getattr(place, name) for name in ("epochs", "metric")},
                    seed=seed,
                    weights_of=None if place.model in ROLES else "vit_t16",
                    value=estimate.value,
                    n=1000,
                    interval=Interval(estimate.value - half, estimate.value + half),
                    chance=None,
                    constant=False,
                )
            )
    return found


# Tables and names.


def test_every_role_has_its_name_and_every_printed_name_a_role() -> None:
    roles = {
        *catalog.TEACHERS,
        *catalog.STUDENTS,
        *catalog.LANGUAGE_MODELS,
        *catalog.DATA,
        *catalog.ZERO_SHOT,
        *vlm_recipes.VLM_RECIPES,
        *RECIPES,
    }
    assert roles <= set(PAPER_NAMES)
    printed = {
        name
        for place in paper_numbers()
        for name in (place.framework, place.llm, place.model, place.teacher, place.loss, place.data)
    }
    assert printed - set(PAPER_NAMES.values()) == {"CLIP-KD-ViT-T"}  # a checkpoint by others
    assert len(ROLES) == sum(name is not None for name in PAPER_NAMES.values())


def test_tables_have_the_shape_and_the_digits_of_the_paper() -> None:
    shapes = {t.name: (len(t.rows), len(t.columns)) for t in paper_tables()}
    assert shapes == {
        "table1": (24, 17), "table2": (22, 18), "table3": (5, 6), "table4": (20, 2),
        "table5": (6, 2), "figure2": (5, 3), "figure3": (12, 3), "clip_labels": (9, 2),
    }  # fmt: skip
    assert all(len(row.cells) == len(t.columns) for t in paper_tables() for row in t.rows)
    gaps = {row.labels[0]: row.cells[2].printed for row in table("figure2").rows}
    assert (gaps["CLIP-ViT-B"], gaps["CLIP-ViT-L"], gaps["SigLIP-so400m"]) == (3.70, 6.65, 8.38)


def test_equal_places_are_printed_alike_but_for_the_known_slip() -> None:
    values: dict[Place, set[float]] = {}
    for cell in (cell for t in paper_tables() for row in t.rows for cell in row.cells):
        if len(cell.terms) == 1 and cell.printed is not None:
            values.setdefault(cell.terms[0][1], set()).add(cell.printed)
    twice = {place for place, found in values.items() if len(found) > 1}
    assert twice == {student("imagenet", name) for name in ("CLIP-ViT-B", "CLIP-ViT-L")}
    assert paper_numbers()[A][0].value == 36.56  # table 2's, not table 3's


def test_printed_averages_have_the_error_of_their_questions() -> None:
    errors = [
        found.standard_error or 0.0
        for place, (found,) in paper_numbers().items()
        if place.metric == "average"
    ]
    assert len(errors) == 24 + 22 + 15 + 4
    assert sum(errors) / len(errors) == pytest.approx(0.29, abs=0.01)
    assert paper_numbers()[A][0].standard_error == pytest.approx(0.215, abs=0.001)


def test_every_note_marks_what_it_is_about() -> None:
    for note in NOTES:
        assert note.text
        assert note.source
        for name in note.tables:
            on = [
                cell
                for row in table(name).rows
                for column, cell in zip(table(name).columns, row.cells, strict=True)
                if note.is_on(row, column, cell)
            ]
            assert bool(on) == bool(note.columns), note.text
    row = table("table3").rows[-1]
    marks = Marks.of(table("table3"), table("table3").columns)
    (number,) = marks.on(row, "CLIP-ViT-B score", row.cells[0])
    assert "36.56" in marks.lines()[number - 1]
    assert marks.on(row, "CLIP-ViT-B CKA", row.cells[1]) == []


# Cells.


def cells_of(found: Beside, name: str) -> list[list[object]]:
    """Our cells of a table."""
    return [list(row) for row in table_named(found, name).ours]


def test_what_was_not_run_is_said_to_be_so() -> None:
    (found,) = beside([])
    assert all(t.num_run == 0 for t in found.tables)
    assert {verdict.verdict for verdict in found.ours} == {"not run"}
    grid = beside_grid(found.tables[1], whole=True)
    assert all("not run" in words.text for row in grid.rows for words in row[1:])


def test_a_number_stands_in_every_table_that_has_its_place() -> None:
    (found,) = beside([one()])
    places = {t.paper.name: t.num_run for t in found.tables}
    # Both language models of table 2 print the student's ImageNet.
    assert places == {"table1": 0, "table2": 2, "table3": 1, "table4": 1, "table5": 0,
                      "figure2": 0, "figure3": 0, "clip_labels": 0}  # fmt: skip
    cell = table_named(found, "table4").ours[2][1]
    assert cell is not None
    assert (cell.value, cell.n, cell.seeds, cell.flags) == (36.0, 50_000, 1, ())
    assert cell.interval == Interval(35.5, 36.5)


def test_given_encoders_stand_with_every_way_of_training() -> None:
    vlm = {"framework": "tinyllava", "llm": "qwen2_0_5b", "metric": "average"}
    nothing = {"teacher": None, "loss": None, "data": None, "epochs": None}
    given = one(**vlm, **nothing, student_or_encoder="clip_b16", value=40.0)
    (found,) = beside([given, one(**vlm, variant="mode=paper", value=30.0)])
    gap = table_named(found, "figure2").ours[1][2]
    assert gap is not None
    assert (found.variant, gap.value) == ("mode=paper", 10.0)


def test_seeds_are_averaged_and_repetitions_do_not_count() -> None:
    runs = [one(seed=seed, value=36.0 + seed) for seed in range(3)]
    (found,) = beside([*runs, one(seed=1, value=99.0)])
    cell = table_named(found, "table4").ours[2][1]
    assert cell is not None
    assert cell.interval is not None
    assert (cell.value, cell.seeds) == (37.0, 3)
    assert cell.interval.high - cell.interval.low > 2 * 1.96 * math.sqrt(1 / 3)


def test_chance_and_one_answer_are_flagged() -> None:
    runs = [
        one(teacher="clip_b16", value=0.2, interval=Interval(0.05, 0.4)),
        one(teacher="clip_l14", value=0.02, interval=Interval(0.0, 0.05), constant=True),
        one(teacher="dfn_l14", limited=True),
    ]
    (found,) = beside(runs)
    flags = {
        row.labels[0]: own[1].flags
        for row, own in zip(table("table4").rows, table_named(found, "table4").ours, strict=True)
        if own[1] is not None
    }
    assert flags == {
        "CLIP-ViT-B": ("at chance",),
        "CLIP-ViT-L": ("below chance", "one answer"),
        "DFN-ViT-L": ("first questions",),
    }


def test_other_ways_of_training_stand_apart() -> None:
    vlm = {"framework": "tinyllava", "llm": "qwen2_0_5b", "metric": "average"}
    runs = [
        one(variant="mode=paper", value=30.0),
        one(),
        one(**vlm, vlm_variant="scored by corrected rules"),
        one(teacher="a tower of one's own"),
        one(loss="clip", teacher=None),
    ]
    first, second = beside(runs)
    assert (first.variant, second.variant) == ("mode=paper", "scored by corrected rules")
    assert [found.tables[3].num_run for found in (first, second)] == [1, 2]
    assert (first.elsewhere, second.elsewhere) == (0, 2)


def test_verdicts_on_the_printed_numbers() -> None:
    printed = {found.claim.name: found for found in beside([])[0].paper}
    assert len(printed) == len(CLAIMS)
    said = {name: found.verdict for name, found in printed.items()}
    assert said["clip_b_teaches_imagenet_best"] == "supported"
    assert said["clip_b_teaches_vlms_best"] == "undecided at this n"  # 0.5 points at 0.4 of error
    assert said["clip_kd_is_best_loss"] == "not supported"  # SigLIP, KL: 30.62 against 25.30
    assert said["more_data_lower_imagenet"] == "supported"
    assert said["longer_training_imagenet_run_to_the_end"] == "not run"  # figure 3 prints no table
    assert printed["cka_higher_with_weaker_teacher"].count("no interval") == 5
    assert printed["clip_b_teaches_vlms_best"].detectable == pytest.approx(1.24, abs=0.02)


def test_the_paper_repeated_with_seeds_confirms_itself() -> None:
    (found,) = beside(all_printed(0, 1, 2))
    for printed, own in zip(found.paper, found.ours, strict=True):
        for theirs, ours in zip(printed.judged, own.judged, strict=True):
            if theirs.found is not None and ours.found is not None:
                assert ours.found.value == pytest.approx(theirs.found.value, abs=1e-9)
    assert sum(own.verdict == "supported" for own in found.ours) >= 5


# Two protocols, premises, two readings.


def verdict_of(found: Beside, name: str) -> Verdict:
    """Our verdict on a claim."""
    return next(own for own in found.ours if own.claim.name == name)


def around(value: float, half: float) -> Interval:
    """An interval about a number."""
    return Interval(value - half, value + half)


def durations() -> list[Measured]:
    """Students of two teachers after 32, 64 and 96 epochs: of one run, and of a run each."""
    points = ((32, None, 34.0), (64, None, 35.0), (96, None, 36.0), (32, 96, 28.0), (64, 96, 31.0))
    return [
        one(teacher, epochs=epochs, schedule=schedule, value=value, interval=around(value, 0.4))
        for teacher in ("clip_l14", "dfn_l14")
        for epochs, schedule, value in points
    ]


def test_figure_3_knows_both_protocols_and_their_common_end() -> None:
    (found,) = beside(durations())
    rows = rows_of(table_csv(table_named(found, "figure3")))
    scores = {
        (row["protocol"], int(row["epochs"])): float(row["ours"])
        for row in rows
        if (row["teacher"], row["column"]) == ("CLIP-ViT-L", "ImageNet")
    }
    end, early = "run to the end", "read on the way of 96"
    assert scores == {
        (end, 32): 34.0, (end, 64): 35.0, (end, 96): 36.0,
        (early, 32): 28.0, (early, 64): 31.0, (early, 96): 36.0,
    }  # fmt: skip
    printed = {row["protocol"] for row in rows if row["paper"]}
    assert printed == {end}  # table 2's students have ended
    gains = {
        name: [one.found and one.found.value for one in verdict_of(found, name).judged]
        for name in (
            "longer_training_imagenet_run_to_the_end",
            "longer_training_imagenet_read_on_the_way_of_96",
            "longer_gain_is_the_cosine",
        )
    }
    assert [*gains.values()] == [[2.0] * 2, [8.0] * 2, [6.0] * 2]
    assert {verdict_of(found, name).verdict for name in gains} == {"supported"}
    lines = [line for axes in long_figure(found).axes for line in axes.lines]
    dashes = [line.get_linestyle() for line in lines if len(line.get_xdata()) == 3]
    assert dashes == ["-", "--"] * 2


def own_average(teacher: str, value: float) -> Measured:
    """The average of the VLM on a teacher itself."""
    nothing = {"teacher": None, "loss": None, "data": None, "epochs": None}
    return averaged(student_or_encoder=teacher, value=value, **nothing)


def averaged(teacher: str = "clip_b16", value: float = 30.0, **fields: object) -> Measured:
    """The average of a VLM on a student."""
    fields = {"framework": "tinyllava", "llm": "qwen2_0_5b", "metric": "average"} | fields
    fields = {"teacher": teacher, "value": value, "interval": around(value, 0.6)} | fields
    return one(**fields)  # type: ignore[arg-type]


def test_teachers_are_stronger_only_where_their_own_score_says_so() -> None:
    students = [averaged("clip_b16", 32.0), averaged("clip_l14", 30.0)]
    name = "stronger_teacher_worse_student"

    def judged(*teachers: Measured) -> tuple[Beside, Verdict]:
        (found,) = beside([*students, *teachers])
        return found, verdict_of(found, name)

    _, as_printed = judged(own_average("clip_l14", 37.0), own_average("clip_b16", 34.0))
    assert (as_printed.verdict, as_printed.judged[0].outcome) == ("supported", "holds")
    found, reverse = judged(own_average("clip_l14", 34.0), own_average("clip_b16", 37.0))
    assert reverse.judged[0].outcome == "does not apply"
    assert reverse.count("holds") + reverse.count("contradicted") == 0
    (note,) = [n for n in claim_grid(found).notes if "stronger than CLIP-ViT-B" in n]
    assert "34.00 against 37.00" in note
    assert "gap of CLIP-ViT-L over gap of CLIP-ViT-B" in note
    row = next(r for r in rows_of(claims_csv(found)) if r["claim"] == name)
    parts = ("our_premise_first", "our_premise_second", "our_premise_outcome", "our_outcome")
    assert [row[part] for part in parts] == ["34.0", "37.0", "contradicted", "does not apply"]
    assert (row["paper_premise_first"], row["paper_premise_outcome"]) == ("36.94", "holds")
    assert judged()[1].verdict == "not run"


def test_both_readings_of_the_clip_labels_stand_beside_ours() -> None:
    losses = ("clip_kd", "mse", "icl", "kl")

    def fits(*differences: float) -> str:
        runs = [
            one(teacher, loss=loss, value=value, interval=around(value, 0.5))
            for loss, d in zip(losses, differences, strict=True)
            for teacher, value in (("clip_b16", 30.0 + d), ("clip_l14", 30.0))
        ]
        (found,) = beside(runs)
        labels = table_named(found, "clip_labels")
        (cell, again) = labels.ours[0]
        assert cell is not None
        assert cell == again
        assert cell.value == pytest.approx(differences[0])
        assert [c.printed for c in labels.paper.rows[0].cells] == [2.01, -2.01]
        return next(line for line in labels.marks.lines() if "By ImageNet" in line)

    assert "as printed; 1 seed" in fits(2.0, 1.5, 0.1, 1.4)
    assert "swapped" in fits(-2.0, -1.5, 0.1, -1.4)
    assert "do not decide" in fits(2.0, -1.5, 0.1, 1.4)
    assert "do not decide" in fits(0.1, -0.1, 0.1, 0.2)


# Files.


def little(folder: Path) -> Path:
    """Writes a sweep file of one student."""
    path = folder / "little.py"
    path.write_text(SWEEP)
    return path


def rows_of(text: str) -> list[dict[str, str]]:
    """Reads CSV back."""
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_holds_every_cell_and_comparison() -> None:
    (found,) = beside([one()])
    rows = rows_of(table_csv(table_named(found, "table3")))
    assert len(rows) == 30
    slip = next(r for r in rows if (r["task"], r["column"]) == ("ImageNet", "CLIP-ViT-B score"))
    assert (slip["paper"], slip["ours"], slip["seeds"]) == ("30.95", "36.0", "1")
    assert "36.56" in slip["notes"]
    assert {r["flags"] for r in rows if r is not slip} == {"not run"}
    lines = rows_of(claims_csv(found))
    assert len(lines) == sum(len(claim.comparisons) for claim in CLAIMS)
    assert {line["our_outcome"] for line in lines} == {"not run"}


def test_latex_is_balanced_and_escaped() -> None:
    assert tex("50 % of a_b & c –") == r"50 \% of a\_b \& c --"
    (found,) = beside([one()])
    for t in found.tables:
        text = table_tex(t)
        body = text[text.index("\\toprule") : text.index("\\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(lines) == 1 + 2 * len(t.paper.rows)
        width = len(t.paper.label_names) + len(t.paper.columns)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {width - 1}
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def points(figure: object) -> int:
    """Counts the filled and hollow points of all panels."""
    panels: Sequence[object] = figure.axes  # type: ignore[attr-defined]
    return sum(line.get_marker() == "o" for axes in panels for line in axes.lines)  # type: ignore[attr-defined]


def test_figures_show_printed_and_measured_points() -> None:
    (empty,) = beside([])
    (full,) = beside(all_printed(0))
    assert (points(gap_figure(empty)), points(gap_figure(full))) == (15, 30)
    assert (points(long_figure(empty)), points(long_figure(full))) == (6, 12)


def test_the_gap_is_seen_against_zero_where_all_gaps_lie_below() -> None:
    vlm: dict[str, Any] = {"framework": "tinyllava", "llm": "qwen2_0_5b", "metric": "average"}
    nothing: dict[str, Any] = {"teacher": None, "loss": None, "data": None, "epochs": None}
    given = one(**vlm, **nothing, student_or_encoder="clip_b16", value=20.0)
    (found,) = beside([given, one(**vlm, value=60.0)])
    panel: Any = gap_figure(found).axes[1]
    low, high = panel.get_ylim()
    assert low < -40
    assert high > 0
    assert [0.0, 0.0] in [list(line.get_ydata()) for line in panel.get_lines()]


def test_departures_from_the_defaults_are_named() -> None:
    distill = Distill(student="vit_t16", teacher="clip_b16")
    assert departures(distill, {"student", "teacher", "loss"}) == ""
    changed = distill.replace(mode="paper", flags={"frozen_heads": True}, max_steps=3)
    expected = "mode=paper, flags=frozen_heads=True, max_steps=3"
    assert departures(changed, {"student", "teacher", "loss"}) == expected


def test_the_command_writes_everything_before_anything_has_run(tmp_path: Path) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    Storage(str(runs)).write(b"", "stages", "distill", "of_another_sweep", "DONE")
    command = ["report", str(little(tmp_path)), "--storage", str(runs)]
    refused = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert refused.exit_code == 2
    assert not out.exists()
    result = CliRunner().invoke(app, [*command, "--paper", "--out", str(out)])
    assert result.exit_code == 0, result.output
    tables = [t.name for t in paper_tables()]
    expected = {f"{name}.{ending}" for name in (*tables, "claims") for ending in ("csv", "tex")}
    expected |= {f"figure{n}.{ending}" for n in (2, 3) for ending in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == expected | {"report.html"}
    assert str(out / "claims.csv") in result.output.replace("\n", "")
    page = (out / "report.html").read_text()
    headings = re.findall(r"<h2.*?>(.*?)</h2>", page)
    assert headings[:3] == [
        "Contents",
        f"Claims of the paper: {DEFAULTS}",
        f"Beside the paper: {DEFAULTS}",
    ]
    links, places = re.findall('<a href="#(.*?)"', page), re.findall(r'<h\d id="(.*?)"', page)
    assert {"claims-of-the-paper-defaults-of-recipes", "table2-0", *places} == set(links)
    assert len(places) == len(set(places))
    assert "Scale mini" in page
    assert not re.search(r"<(script|link|iframe)|@import|\ssrc=", page)
    assert (out / "figure2.svg").read_text().count("xmlns=") >= 1
    answer = CliRunner().invoke(app, [*command, "--paper", "--json"])
    document = json.loads(answer.stdout, parse_constant=pytest.fail)  # no NaN
    assert [t["name"] for t in document["paper"][0]["tables"]] == tables
    assert {"trials", "message"} <= set(document)


def test_nothing_is_measured_where_nothing_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(little(tmp_path))
    plan = make_plan([sweep], Storage(str(tmp_path / "runs")), MINI, {})
    report = build_report(plan, [sweep])
    assert measured(report, plan) == []
    monkeypatch.setattr("kdscale.sweep.paper_report.FIGURES", ())  # they take their time
    paths = write_paper(report, plan, beside([one(), one(variant="lr=0.001")]), tmp_path / "out")
    assert tmp_path / "out" / "variant1" / "table4.csv" in paths


def test_the_page_on_claims_states_the_verdicts() -> None:
    text = (Path(__file__).parent.parent / "docs" / "claims.md").read_text()
    for found in beside([])[0].paper:
        line = f"| {found.claim.text} ({found.claim.source}) | {said(found)} |"
        assert line in text.splitlines()
