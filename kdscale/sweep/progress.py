"""What a person sees before a sweep runs, while it runs, and of one that runs elsewhere."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdscale.core.config import Distill
from kdscale.core.journal import JournalReader, Line
from kdscale.core.types import StorageError
from kdscale.sweep.kept import is_finished
from kdscale.sweep.naming import label
from kdscale.sweep.plan import Plan, Stage
from kdscale.sweep.tree import prefixed, rounded, stage_tree

PRINT_EVERY_S = 5.0
WORTH_IT = 1.05  # times the work of caching that training online has to take


class Progress:
    """Prints stages' progress as lines, so that it reads well in a log, too.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line with the time since the start."""
        elapsed = int(time.monotonic() - self._started)
        self._console.print(f"[dim]{elapsed // 60:2d}:{elapsed % 60:02d}[/] {text}")

    def line(self, stage: Stage, line: Line) -> None:
        """Shows a journal line: evaluations always, steps every few seconds."""
        now = time.monotonic()
        is_evaluation = "zero_shot_top1" in line
        is_last = line["step"] == stage.total_steps
        if not (is_evaluation or is_last) and now - self._last.get(stage.key, 0) < PRINT_EVERY_S:
            return
        self._last[stage.key] = now
        self.say(f"[cyan]{stage.kind}[/] {stage.name}: {describe_line(line, stage.total_steps)}")


class Follower:
    """Shows what the stages' journals say from a thread, whatever happens to MLflow.

    Args:
        plan: What is run; only stages that are left to run are followed.
        progress: Where to show it.
        every_s: Seconds between two looks.
    """

    def __init__(self, plan: Plan, progress: Progress, every_s: float = 2.0) -> None:
        self._plan, self._progress, self._every_s = plan, progress, every_s
        self._readers: dict[str, JournalReader] = {}
        self._failures: dict[str, Any] = {}
        self._ended: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="progress")

    def __enter__(self) -> Follower:
        begun: set[str] = set()
        with suppress(OSError, StorageError):
            begun = self._plan.begun()
        for stage in (stage for stage in self._plan.remaining() if stage.key in begun):
            store = stage.store(self._plan.storage)
            self._readers[stage.key] = reader = JournalReader(store)
            with suppress(OSError, StorageError):  # an earlier run has shown these
                reader.new_lines()
                self._failures[stage.key] = store.failure()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Shows new lines and new failures; a storage fault is left to the next look.

        Stages that have not begun or were seen to end cost no query each: there may be hundreds.
        """
        begun: set[str] = set()
        with suppress(OSError, StorageError):
            begun = self._plan.begun()
        for stage in self._plan.remaining():
            if stage.key in begun and stage.key not in self._ended:
                with suppress(OSError, StorageError):
                    self._look_at(stage)

    def _look_at(self, stage: Stage) -> None:
        """Shows what is new of one stage."""
        store = stage.store(self._plan.storage)
        is_over = is_finished(stage, self._plan.storage)  # before its last lines are read
        for line in self._readers.setdefault(stage.key, JournalReader(store)).new_lines():
            self._progress.line(stage, line)
        failure = None if is_over else store.failure()
        if failure and failure != self._failures.get(stage.key):
            text = f"{stage.name}: {failure['message']} (kdscale logs {stage.key[:8]})"
            self._progress.say(f"{stage.kind} [red]failed[/] {escape(text)}")
        self._failures[stage.key] = failure
        if is_over:
            self._ended.add(stage.key)

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()
        self.look()


def describe_line(line: Line, total_steps: int | None) -> str:
    """Puts a journal line in words."""
    if "questions" in line:
        return (
            f"{line['questions']} questions  {line['accuracy']:.1f} % right, "
            f"{line['blind']:.1f} % without the image"
        )
    if "images" in line:
        return _measured(line)
    if "asked" in line:
        return f"question {line['step']}/{line['asked']}  {line['samples_per_s']:,.1f} samples/s"
    if "shards" in line:
        return f"shard {line['step']}/{line['shards']}  {line['samples_per_s']:,.0f} samples/s"
    parts = [f"step {line['step']}/{total_steps or '?'}", f"loss {line['total']:.3f}"]
    if "zero_shot_top1" in line:
        parts.append(f"top-1 {line['zero_shot_top1']:.1f} %")
    if "cka_debiased" in line:
        parts.append(f"CKA {line['cka_debiased']:.3f}")
    parts.append(f"{line['samples_per_s']:,.0f} samples/s")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"data wait {100 * line['data_wait']:.0f} %")
    return "  ".join(parts)


def _measured(line: Line) -> str:
    """Puts the journal line of a stage that looks at images in words."""
    parts = [f"{line['images']:,} images"]
    if "published_top1" in line:
        parts.append(
            f"top-1 {line['zero_shot_top1']:.2f} %, published {line['published_top1']:.2f} %"
        )
    parts += [f"CKA {line['cka_debiased']:.3f}"] if "cka_debiased" in line else []
    return "  ".join([*parts, f"{line['samples_per_s']:,.0f} samples/s"])


def print_to_choose(plan: Plan, console: Console) -> None:
    """Says how many trials searchers will choose."""
    for sweep, chosen in plan.searches.items():
        if chosen.num_left:
            so_far = f"{len(chosen.configs)} chosen so far"
            left = f"+ {chosen.num_left} to be chosen while running"
            console.print(f"{escape(sweep)}: {so_far}, {left}")


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a plan: teachers, the tree of stages, and the cost of what is left to run."""
    if any(stage.kind == "teacher" for stage in plan.stages.values()):
        console.print(teacher_table(plan))
    console.print(stage_tree(plan))
    print_to_choose(plan, console)
    console.print(_cost_line(plan.document()["cost"]))
    _print_savings(plan, console)
    for text in sorted(set(plan.missing)):
        console.print(f"[yellow]missing:[/] {escape(text)}")
    for text in dict.fromkeys(plan.notes):
        console.print(f"[yellow]note:[/] {escape(text)}")


def _cost_line(cost: dict[str, Any]) -> str:
    """Says what is left to run costs, as far as that is known."""
    work, size = "work unknown", "size of the output unknown"
    if cost["flops"] is not None:
        work = f"{prefixed(cost['flops'], 'FLOP')}, {rounded(cost['gpu_hours'])} GPU-hours"
        work += f"{priced(cost['money'], cost['currency'])}"
    if cost["bytes_out"] is not None:
        size = f"{prefixed(cost['bytes_out'], 'B')} of output"
    done = cost["stages_total"] - cost["stages_to_run"]
    reused = f" ({done} reused)" if done else ""
    return (
        f"to run: {cost['stages_to_run']} of {cost['stages_total']} stages{reused}, {work}, {size}"
        f"{_estimated(cost)}\n"
        f"[dim]on {cost['accelerator']} at {cost['efficiency']:.0%} of its {cost['peak_tflops']:g} "
        "TFLOP/s (--accelerator, --efficiency, --prices)[/]"
    )


def priced(money: dict[str, float | None], currency: str) -> str:
    """Puts amounts of money in words, as far as they are known: " (12 USD on demand, ...)"."""
    names = {"on_demand": "on demand", "spot": "spot"}
    known = [f"{rounded(v)} {currency} {names[k]}" for k, v in money.items() if v is not None]
    return f" ({', '.join(known)})" if known else ""


def _estimated(document: dict[str, Any]) -> str:
    """Says where numbers do not rest on a manifest."""
    return " [yellow](estimated: data not at hand)[/]" if document["estimated"] else ""


def _print_savings(plan: Plan, console: Console) -> None:
    """Prints what training costs with the frozen towers online and from caches."""
    document, currency = plan.document(), plan.rates.currency
    found = document["teacher_cache"]
    if found is not None:
        views = " or ".join(map(str, found["views"]))
        more = f" with {views} views in {prefixed(found['bytes_stored'], 'B')}"
        more += f"{_instead(found, currency)} [dim](teacher_outputs=cached)[/]"
        console.print(f"teachers {_compared(found, more)}")
    found = document["feature_cache"]
    if found is not None:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found["share_saved"].items())
        more = f" in at most {prefixed(found['bytes_stored'], 'B')}; less work in {shares}"
        more += f"{_instead(found, currency)} [dim](feature_cache=True)[/]"
        console.print(f"VLM towers {_compared(found, more)}")


def _compared(found: dict[str, Any], more: str) -> str:
    """Compares the cost of training with towers online and cached, filling the cache included.

    Args:
        found: The two costs.
        more: What else is said of a cache that is worth it.
    """
    online, cached = found["online_gpu_hours"], found["cached_gpu_hours"]
    if online <= WORTH_IT * cached:
        costs = f"{rounded(cached)} instead of {rounded(online)} GPU-hours"
        return f"not worth a cache: {costs}{_estimated(found)}"
    change = f"{online / cached:.1f} times less"
    costs = f"online {rounded(online)} GPU-hours, cached {rounded(cached)} ({change})"
    return f"{costs}{more}{_estimated(found)}"


def _instead(found: dict[str, Any], currency: str) -> str:
    """Says what that is in money, where the price of an hour is known."""
    online, cached = (found[f"{how}_money"]["on_demand"] for how in ("online", "cached"))
    return "" if online is None else f", {rounded(cached)} instead of {rounded(online)} {currency}"


def teacher_table(plan: Plan) -> Table:
    """Returns what distinguishes the teachers that this plan trains itself."""
    table = Table("teacher", "width", "patch", "pixels", "tokenizer", "loss", "data noise")
    for stage in plan.stages.values():
        recipe = stage.recipe
        if stage.kind != "teacher" or not isinstance(recipe, Distill):
            continue
        tower: Any = recipe.student
        mini = getattr(recipe.data, "mini", None)
        cells = [tower.name, tower.width, tower.patch_px, tower.image_px, tower.tokenizer]
        cells += [label(recipe.loss)]
        table.add_row(*map(str, cells), "" if mini is None else f"{mini.caption_noise:.0%}")
    return table
