"""A user's searcher between Tune and the record of what it has chosen.

A record is replayed first. A searcher that takes evaluated points is told all of them; any other
is asked and told in the recorded order, and has to suggest the same again.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from kdscale.core.types import ConfigError
from kdscale.sweep.chosen import Chosen, as_kept
from kdscale.sweep.schedule import REFUSED
from kdscale.sweep.search import Config, Search, plain


class Suggested(Searcher):
    """Suggests what the record lacks, and keeps what comes of it.

    Args:
        searcher: Chooses configurations.
        search: Space, metric and mode.
        chosen: The record.
        work_of: Plans a configuration's trial; what it returns is handed to the trial.
        is_over: Whether nothing more is to be begun.

    Raises:
        ConfigError: If this is no searcher, or does not repeat the record.
    """

    def __init__(
        self,
        searcher: Any,
        search: Search,
        chosen: Chosen,
        work_of: Callable[[Config], Any],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(search.metric, search.mode)
        self._searcher = _unwrapped(searcher)
        self._search, self._chosen, self._work_of = search, chosen, work_of
        self._is_over = is_over
        self._searcher.set_search_properties(search.metric, search.mode, dict(search.space))
        self._asked: set[int] = set()  # configurations that this searcher has suggested itself
        self._numbers: dict[str, int] = {}
        self._again = list(chosen.unfinished)
        self._replay()

    def suggest(self, trial_id: str) -> Any:
        """Returns an unfinished trial of the record, or a new one."""
        if self._is_over():
            return Searcher.FINISHED
        if self._again:
            number = self._again.pop(0)
        elif self._chosen.num_left == 0:
            return Searcher.FINISHED
        else:
            config = self._ask(len(self._chosen.configs))
            if not isinstance(config, Mapping):
                return config
            number = self._chosen.choose(config)
        self._numbers[trial_id] = number
        return {"work": self._work_of(self._chosen.configs[number])}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes evaluations on."""
        number = self._numbers[trial_id]
        if number in self._asked and "lease" in result:
            self._searcher.on_trial_result(_name(number), result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the searcher and the record; a failed trial is run again another time."""
        number = self._numbers[trial_id]
        found = result or {}
        value, is_stopped = found.get(self._search.metric), bool(found.get("stopped"))
        if error or REFUSED in found or value is None:
            self._tell(number, None, is_stopped)
            return
        self._chosen.end(number, float(value), is_stopped)
        self._tell(number, float(value), is_stopped)

    def set_search_properties(
        self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Takes Tune's word; the searcher has got its space already."""
        return True

    def _ask(self, number: int) -> Any:
        """Asks the searcher for a configuration."""
        found = self._searcher.suggest(_name(number))
        if not isinstance(found, Mapping):
            return found  # none for the time being, or no more
        unknown = [name for name in found if name not in self._search.space]
        if unknown:
            raise ConfigError(
                f"{type(self._searcher).__name__} suggests {unknown[0]!r}, which is not in the "
                f"space ({', '.join(self._search.space)})"
            )
        self._asked.add(number)
        return {name: plain(v) for name, v in {**self._search.constants(), **found}.items()}

    def _tell(self, number: int, value: float | None, is_stopped: bool) -> None:
        """Tells the searcher how a configuration's trial has ended."""
        if number in self._asked:
            result = None if value is None else {self._search.metric: value, "done": True}
            self._searcher.on_trial_complete(_name(number), result=result, error=value is None)
        elif value is not None:
            config = dict(self._chosen.configs[number])
            self._searcher.add_evaluated_point(config, value, pruned=is_stopped)

    def _replay(self) -> None:
        """Tells the searcher what the record holds."""
        takes_points = type(self._searcher).add_evaluated_point is not Searcher.add_evaluated_point
        number = 0
        for event in self._chosen.events:
            if "ended" in event:
                self._tell(event["ended"], event["value"], event["stopped"])
                continue
            if not takes_points and as_kept(self._ask(number)) != event["chosen"]:
                raise ConfigError(
                    f"{type(self._searcher).__name__} does not suggest again what it has chosen "
                    f"({event['chosen']}), and takes no evaluated points: remove "
                    f"{self._chosen.storage.url(*self._chosen.parts)}, or make it deterministic"
                )
            number += 1


def _name(number: int) -> str:
    """Names a trial for the searcher, the same in every run."""
    return f"{number:05d}"


def _unwrapped(searcher: Any) -> Searcher:
    """Returns the searcher that suggests configurations."""
    if isinstance(searcher, SearchGenerator):
        return searcher.searcher
    if not isinstance(searcher, Searcher):
        raise ConfigError(
            f"{type(searcher).__name__} makes trials of its own; give a ray.tune.search.Searcher, "
            "or leave the searcher out to draw from the space"
        )
    return searcher
