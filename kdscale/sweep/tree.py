"""The stages of a plan as a tree: what follows from what, what is finished, what the rest costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.tree import Tree

from kdscale.core.answers_config import Answers
from kdscale.core.eval_config import Cka
from kdscale.sweep.cost import total
from kdscale.sweep.naming import label
from kdscale.sweep.plan import Plan
from kdscale.sweep.stage import Stage

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
LEAST_HOURS = 0.001  # of a stage, to be shown
FOLD_ABOVE = 8  # like stages below one parent, in a line of their own each


def stage_tree(plan: Plan) -> Tree:
    """Returns the distinct stages of a plan, each below the last stage that it needs.

    More than `FOLD_ABOVE` like stages below one parent share a line, and so do the stages that
    follow from them, kind by kind. Answers to benchmarks always share one.
    """
    tree = Tree(f"[bold]{len(plan.trials)} trials, {len(plan.stages)} distinct stages[/]")
    children: dict[str, list[Stage]] = {}
    for stage in plan.stages.values():
        parent = stage.inputs[-1] if stage.inputs else ""
        children.setdefault(parent if parent in plan.stages else "", []).append(stage)
    _grow(tree, plan, children, [""])
    return tree


def rounded(value: float) -> str:
    """Writes a number of hours or money with two or three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def prefixed(value: float, unit: str) -> str:
    """Writes an amount with three digits and an SI prefix: 82.7 GB, 1.78 ZFLOP."""
    shown = float(f"{value:.3g}")
    prefixes = iter(PREFIXES)
    prefix = next(prefixes)
    while shown >= 1000 and (larger := next(prefixes, None)) is not None:
        shown, prefix = shown / 1000, larger
    return f"{shown:,.0f} {prefix}{unit}" if shown >= 1000 else f"{shown:.3g} {prefix}{unit}"


def _grow(
    branch: Tree, plan: Plan, children: Mapping[str, Sequence[Stage]], parents: Sequence[str]
) -> None:
    """Adds what follows from some stages, which share a line if they are several."""
    by_kind: dict[str, list[Stage]] = {}
    for parent in parents:
        for stage in children.get(parent, ()):
            by_kind.setdefault(f"{stage.kind} {_pair(stage)}", []).append(stage)
    for like in by_kind.values():
        few = len(parents) == 1 and len(like) <= FOLD_ABOVE
        if isinstance(like[0].recipe, Answers):
            branch.add(_answers_label(like))
        elif isinstance(like[0].recipe, Cka):
            branch.add(_cka_label(like))
        elif few or len(like) == 1:
            for stage in like:
                _grow(branch.add(_stage_label(plan, stage)), plan, children, [stage.key])
        else:
            keys = [stage.key for stage in like]
            _grow(branch.add(_folded_label(plan, like)), plan, children, keys)


def _stage_label(plan: Plan, stage: Stage) -> str:
    """Describes a stage in one line."""
    unit = "shards" if stage.kind in ("embed", "features") else "steps"
    count = stage.total_steps
    if stage.kind in ("evaluate", "answers"):
        unit, count = "questions", stage.num_samples
    if stage.kind == "gate":
        unit, count = "images", stage.num_samples
    about = "about " if stage.estimated and count else ""
    state = f"{about}{count or 'unknown'} {unit}{_hours(plan, [stage])}"
    if stage.reused:
        state = "[green]finished[/]"
    shared = plan.shared_by(stage.key)
    note = f", shared by {shared} trials" if shared > 1 else ""
    note += f", [yellow]{stage.note}[/]" if stage.note else ""
    return f"[cyan]{stage.kind}[/] {stage.name}  [dim]{stage.key}[/]  {state}{note}"


def _folded_label(plan: Plan, stages: Sequence[Stage]) -> str:
    """Describes many stages of one kind in one line."""
    left = [stage for stage in stages if not stage.reused]
    names = list(dict.fromkeys(stage.name for stage in stages))
    named = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
    done = f"[green]{len(stages) - len(left)} finished[/], " if len(left) < len(stages) else ""
    return (
        f"[cyan]{stages[0].kind}[/] x {len(stages)}  {named}  "
        f"{done}{len(left)} to run{_hours(plan, left)}"
    )


def _answers_label(stages: Sequence[Stage]) -> str:
    """Describes the answers of VLMs to their benchmarks in a line; each is a stage."""
    names = list(dict.fromkeys(s.recipe.benchmark for s in stages if isinstance(s.recipe, Answers)))
    left = sum(not stage.reused for stage in stages)
    asked = sum(stage.num_samples or 0 for stage in stages)
    count = f"{asked:,}" if asked else "unknown"
    return f"answers to {', '.join(names)}: {count} questions, {len(stages)} stages, {left} to run"


def _pair(stage: Stage) -> str:
    """Names the two models of a comparison and the tap; empty for other stages."""
    recipe = stage.recipe
    if not isinstance(recipe, Cka):
        return ""
    return f"{label(recipe.a)} with {label(recipe.b)}, {recipe.tap}"


def _cka_label(stages: Sequence[Stage]) -> str:
    """Describes the comparisons of one pair of models in a line; each is a stage."""
    names = [s.recipe.images.name for s in stages if isinstance(s.recipe, Cka)]
    left = sum(not stage.reused for stage in stages)
    images = total(stage.num_samples for stage in stages)
    count = "unknown" if images is None else f"{images:,.0f}"
    pair = _pair(stages[0])
    return (
        f"CKA of {pair}, on {', '.join(names)}: {count} images, {len(stages)} stages, {left} to run"
    )


def _hours(plan: Plan, stages: Sequence[Stage]) -> str:
    """Says how many GPU-hours stages take, where that is known and more than some seconds."""
    hours = plan.gpu_hours(total(stage.flops for stage in stages))
    return "" if hours is None or hours < LEAST_HOURS else f", {rounded(hours)} GPU-hours"
