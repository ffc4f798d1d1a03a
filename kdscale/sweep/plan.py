"""The stage graph of sweeps: distinct stages, what is finished, what it will cost.

A plan needs neither torch nor Ray; it reads manifests and the stage store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdscale.core.config import (
    EMBED_STAGE,
    DataSpec,
    Distill,
    Recipe,
    TowerSpec,
)
from kdscale.core.eval_config import BenchmarkImages, Cka
from kdscale.core.keys import digest, identity, local_files
from kdscale.core.scale import Scale, Sizes, data_names, resolve, teacher_of
from kdscale.core.storage import StageStore, Storage
from kdscale.core.trained import trained_by, trained_weights
from kdscale.core.types import NoShards
from kdscale.core.vlm_config import Evaluate, Language, Vlm, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.data.shards import Content
from kdscale.stages.inputs import Source, content_of, find_source
from kdscale.stages.jobs import embed_recipe, features_recipe
from kdscale.stages.shares import workers_note
from kdscale.sweep.absent import each_once, no_path
from kdscale.sweep.amounts import amount, beside_recipe
from kdscale.sweep.check import check_cacheable, check_paths, check_recipe
from kdscale.sweep.chosen import Chosen, check_search, configs_of
from kdscale.sweep.cka import add_cka
from kdscale.sweep.cost import bytes_out, feature_saving, flops, saving, total
from kdscale.sweep.gates import FOR_GATES, add_gate, gate_source
from kdscale.sweep.grid import Sweep, Trial
from kdscale.sweep.kept import keeping, looked_up
from kdscale.sweep.naming import label
from kdscale.sweep.prices import Rates, default_rates
from kdscale.sweep.stage import PlannedTrial, Stage
from kdscale.sweep.vlm import add_vlm


@dataclass
class Plan:
    """Trials and distinct stages of one or several sweeps.

    Attributes:
        stages: {key: stage}, inputs before the stages that need them.
        missing: Inputs that are not at hand, in words.
        notes: What the sweeps ask for and the scale does not have, in words.
        rates: What hours and money are counted by.
        redo: Keys of stages that are run though all their trials have what they need.
        overrides: Recipe fields that were set last.
        searches: {sweep: what its searcher has chosen so far}.
    """

    scale: Scale
    storage: Storage
    trials: list[PlannedTrial] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: Rates = field(default_factory=default_rates)
    redo: frozenset[str] = frozenset()
    overrides: dict[str, Any] = field(default_factory=dict)
    searches: dict[str, Chosen] = field(default_factory=dict)

    def gpu_hours(self, flops: float | None) -> float | None:
        """Returns the hours of one accelerator that operations take, None where unknown."""
        return None if flops is None else self.rates.gpu_hours(flops)

    def shared_by(self, key: str) -> int:
        """Returns how many trials go through a stage."""
        return sum(key in trial.path for trial in self.trials)

    def remaining(self) -> list[Stage]:
        """Returns the stages that have to be run."""
        return [stage for stage in self.stages.values() if not stage.reused]

    def begun(self) -> set[str]:
        """Returns the keys of its stages of which the storage has anything, by a listing a kind."""
        kinds = {stage.kind for stage in self.stages.values()}
        there = {(kind, key) for kind in kinds for key in self.storage.names("stages", kind)}
        return {s.key for s in list(self.stages.values()) if (s.kind, s.key) in there}

    def document(self) -> dict[str, Any]:
        """Returns the plan as JSON: trials, stages, cost."""
        works = [stage.work for stage in self.stages.values()]
        guessed = {"estimated": any(stage.estimated for stage in self.stages.values())}
        teachers, features = saving(works), feature_saving(works)
        to_choose = {name: chosen.num_left for name, chosen in self.searches.items()}
        return {
            "trials": [
                {
                    "sweep": planned.sweep,
                    "name": planned.trial.name,
                    "chosen": planned.trial.chosen,
                    "stages": list(planned.path),
                }
                for planned in self.trials
            ],
            "stages": [self._stage_document(stage) for stage in self.stages.values()],
            "cost": self._cost(),
            "teacher_cache": teachers and teachers.document(self.rates) | guessed,
            "feature_cache": features and features.document(self.rates) | guessed,
        } | ({"to_choose": to_choose} if to_choose else {})

    def _stage_document(self, stage: Stage) -> dict[str, Any]:
        """Returns a stage as JSON."""
        return {
            "kind": stage.kind,
            "key": stage.key,
            "name": stage.name,
            "inputs": list(stage.inputs),
            "reused": stage.reused,
            "shared_by": self.shared_by(stage.key),
            "total_steps": stage.total_steps,
            "flops": stage.flops,
            "bytes_out": stage.bytes_out,
            "gpu_hours": self.gpu_hours(stage.flops),
            "estimated": stage.estimated,
            "note": stage.note,
        }

    def _cost(self) -> dict[str, Any]:
        """Returns what is left to run costs as JSON; None stands for a total that is not known."""
        rest = self.remaining()
        work = total(stage.flops for stage in rest)
        return {
            "scale": self.scale.name,
            "stages_total": len(self.stages),
            "stages_to_run": len(rest),
            "flops": work,
            "gpu_hours": self.gpu_hours(work),
            "money": self.rates.money(self.gpu_hours(work)),
            "bytes_out": total(stage.bytes_out for stage in rest),
            "estimated": any(stage.estimated for stage in rest),
            "missing": self.missing,
            "notes": self.notes,
            **self.rates.document(),
        }


class Planner:
    """Turns sweeps into a plan.

    Args:
        storage: Where finished stages, drawn data and manifests are looked for.
        scale: What roles mean.
        overrides: Recipe fields set last (`--set`, `--max-steps`).
    """

    def __init__(self, storage: Storage, scale: Scale, overrides: Mapping[str, Any]) -> None:
        self.plan = Plan(scale=scale, storage=storage, overrides=dict(overrides))
        self.overrides = dict(overrides)
        self._sources: dict[tuple[str, str], Source | None] = {}
        self.names: set[str] = set()

    def add(self, sweep: Sweep) -> None:
        """Adds a sweep's trials and the stages that are not in the plan yet.

        Raises:
            ConfigError: If an override sets what the sweep varies, or a recipe cannot run.
        """
        trials = sweep.trials(self.overrides, configs_of(self, sweep))
        self.add_trials(sweep.name, trials)
        check_search(self.plan, sweep)

    def add_trials(self, sweep: str, trials: Sequence[Trial]) -> None:
        """Adds trials of a sweep; ConfigError if a recipe cannot run."""
        for trial in trials:
            path: list[str] = []
            epoch = None
            if isinstance(trial.recipe, Vlm):
                tower = add_vlm(self, trial.recipe, trial.name, path)
            else:
                tower = self.distill(trial.recipe, trial.name, path)
                epoch = trained_by(tower.weights)[2]
            key = path[-1]
            add_cka(self, trial, tower, path)
            whole = tuple(dict.fromkeys(path))
            planned = PlannedTrial(sweep=sweep, trial=trial, path=whole, key=key, epoch=epoch)
            self.plan.trials.append(planned)

    def distill(self, recipe: Distill, name: str, path: list[str]) -> TowerSpec:
        """Adds a distillation with the stages that it needs, and returns its student."""
        # Set in the trial already, before a scale shrank the sizes; roles are specs by now.
        own = Distill.model_fields.keys() - {"student", "teacher", "data", "zero_shot"}
        again = {k: v for k, v in self.overrides.items() if k in own}
        return self._distill(recipe, name, path, again)

    def _distill(
        self, recipe: Distill, name: str, path: list[str], overrides: Mapping[str, Any]
    ) -> TowerSpec:
        """Adds a distillation with the stages that it needs, and returns its student."""
        resolved = resolve(recipe, self.plan.scale, overrides)
        epoch = resolved.read_epoch
        resolved = resolved.replace(teacher=self.teacher(recipe, path), read_epoch=None)
        add_gate(self, resolved, path)
        resolved = self._cached(resolved, path)
        key = self.add_stage("distill", name, resolved, path)
        assert isinstance(resolved.student, TowerSpec)
        return resolved.student.replace(weights=trained_weights("distill", key, epoch))

    def expect_data(self, *names: str) -> None:
        """Takes a path for a data set of these names, which no stage's `data` field names."""
        self.names.update(names)

    def teacher(self, recipe: Distill, path: list[str]) -> TowerSpec | None:
        """Returns the teacher's tower; adds the stage that trains it where there is one."""
        found = teacher_of(recipe, self.plan.scale)
        if not isinstance(found, Distill):
            return found
        limits = {k: v for k, v in self.overrides.items() if k in ("max_steps", "run")}
        if found is recipe.teacher:
            return self._distill(found, label(found), path, limits)
        tower = found.student
        assert isinstance(tower, TowerSpec)
        own_sizes = self.plan.scale.replace(sizes=Sizes())
        pretrain = resolve(found, own_sizes, limits)
        key = self.add_stage("teacher", tower.name, pretrain, path)
        return tower.replace(weights=trained_weights("teacher", key))

    def _cached(self, recipe: Distill, path: list[str] | None) -> Distill:
        """Adds the stages that fill a teacher cache, unless there is no path, and names them."""
        if recipe.teacher_outputs != "cached":
            return recipe
        if recipe.teacher is None:
            return recipe.replace(teacher_outputs="online")  # one key, whatever is asked of others
        check_cacheable(recipe)
        teacher: Any = recipe.teacher
        wanted = {"teacher_outputs": (f"{teacher.name} x {recipe.views}", embed_recipe(recipe))}
        if recipe.zero_shot is not None:
            wanted["eval_outputs"] = f"{teacher.name} for CKA", features_recipe(recipe)
        changes: dict[str, str] = {}
        for field_name, (name, embed) in wanted.items():
            if path is not None:
                self.add_stage("embed", name, embed, path)
            changes[field_name] = EMBED_STAGE + self.key_of("embed", embed)
        return recipe.replace(**changes)

    def is_trained(self, recipe: Distill) -> bool:
        """Tells whether a distillation is done, its teacher's cache aside."""
        return self.is_done(self._cached(recipe, None))

    def identity_of(self, kind: str, recipe: Recipe) -> dict[str, Any]:
        """Returns what decides a stage's numbers, whether the plan has it or not."""
        manifests = {s.spec.urls: s.hash for s in self._sources_of(recipe) if s and s.spec.urls}
        more = beside_recipe(recipe) | local_files(recipe)
        return identity(kind, recipe.version, recipe, manifests, more)

    def key_of(self, kind: str, recipe: Recipe) -> str:
        """Returns the content key of a stage, whether the plan has it or not."""
        return digest(self.identity_of(kind, recipe))

    def is_done(self, recipe: Recipe) -> bool:
        """Tells whether a stage is finished that is of the kind of its recipe."""
        key = self.key_of(recipe.kind, recipe)
        return StageStore(self.plan.storage, recipe.kind, key).is_done()

    def add_stage(
        self,
        kind: str,
        name: str,
        recipe: Recipe,
        path: list[str],
        inputs: tuple[str, ...] | None = None,
    ) -> str:
        """Adds a stage unless the plan has it, and appends its key to the path.

        Its inputs are all stages of the path so far, where none are named.
        """
        if isinstance(recipe, Distill):
            check_recipe(recipe)
        note = workers_note(recipe) if isinstance(recipe, Distill | VlmStage) else ""
        self.plan.notes += [note] if note and note not in self.plan.notes else []
        sources = self._sources_of(recipe)
        wanted, data = len(sources), sources[0] if sources else None
        whole = self.identity_of(kind, recipe)
        key = digest(whole)
        if key in self.plan.stages:
            self.plan.stages[key] = keeping(self.plan.stages[key], recipe, self.plan.storage)
        else:
            work = amount(recipe, data)
            stage = Stage(
                kind=kind,
                key=key,
                name=name,
                recipe=recipe,
                inputs=tuple(path) if inputs is None else inputs,
                num_samples=work.num_samples,
                total_steps=work.total_steps,
                flops=flops(work),
                bytes_out=bytes_out(work),
                reused=False,
                estimated=wanted > 0 and data is None and work.num_samples is not None,
                data_hash=data.hash if data is not None and data.spec.urls else None,
                identity=whole,
            )
            self.plan.stages[key] = looked_up(stage, self.plan.storage)
        path.append(key)
        return key

    def _sources_of(self, recipe: Recipe) -> list[Source | None]:
        """Finds a recipe's training data and, after them, its benchmark's."""
        if isinstance(recipe, Evaluate | Language):
            return []
        if isinstance(recipe, Cka):
            on = recipe.images
            return [] if isinstance(on, BenchmarkImages) else [self._source(on, "labels")]
        if isinstance(recipe, Gate):
            return [self.gate_source(recipe)]
        read: Any = recipe
        benchmark = getattr(recipe, "zero_shot", None)
        more = [] if benchmark is None else [self._source(benchmark.data, "labels")]
        return [self._source(read.data, content_of(recipe)), *more]

    def gate_source(self, recipe: Gate) -> Source | None:
        """Finds the images of a gate once; None where they are not at hand."""
        if recipe.data.urls is None:
            return None
        name = (recipe.data.model_dump_json(), "gate")
        if name not in self._sources:
            self.names.update(data_names(recipe.data, self.plan.scale))
            try:
                self._sources[name] = gate_source(recipe, self.plan.storage)
            except NoShards as error:
                self._sources[name] = None
                self.plan.missing.append(f"{error}{FOR_GATES}")
        return self._sources[name]

    def _source(self, spec: Any, content: Content = "captions") -> Source | None:
        """Finds a data set once; absent data are noted, not fatal: a plan may come first."""
        assert isinstance(spec, DataSpec)
        self.names.update(data_names(spec, self.plan.scale))
        if spec.urls == self.plan.scale.data_paths.get(""):
            self.names.add("")
        name = (spec.model_dump_json(), content)
        if name not in self._sources:
            self._sources[name] = None
            if spec.mini is None and spec.urls is None:
                self.plan.missing.append(no_path(spec, self.plan.scale, content))
                return None
            try:
                self._sources[name] = find_source(spec, self.plan.storage, content=content)
            except NoShards as error:
                self.plan.missing.append(str(error))
        return self._sources[name]


def make_plan(
    sweeps: Sequence[Sweep], storage: Storage, scale: Scale, overrides: Mapping[str, Any]
) -> Plan:
    """Plans several sweeps as one union of stages.

    Args:
        sweeps: The sweeps, in order.
        storage: The stage store.
        scale: What roles mean.
        overrides: Recipe fields set last.
    """
    planner = Planner(storage, scale, overrides)
    for sweep in sweeps:
        planner.add(sweep)
    check_paths(scale.data_paths, planner.names)
    planner.plan.missing = each_once(planner.plan.missing)
    return planner.plan
