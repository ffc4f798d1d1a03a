"""Keeps MLflow up to date beside a run; a server that is lost is only a warning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from kdscale.core.redaction import redacted
from kdscale.sweep.tracking import Tracker

logger = logging.getLogger(__name__)


class Mirror:
    """Keeps MLflow up to date from a thread, whatever happens to the server.

    Args:
        make_trackers: Connects; called again until it works.
        every_s: Seconds between synchronisations.
    """

    def __init__(self, make_trackers: Callable[[], list[Tracker]], every_s: float = 2.0) -> None:
        self._make, self._every_s = make_trackers, every_s
        self._trackers: list[Tracker] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="mlflow")
        self._warned = False

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def publish(
        self, sweep: str, files: Mapping[str, str], scores: Mapping[str, Mapping[str, float]]
    ) -> str:
        """Ends a sweep's finished runs and attaches its report; a lost server is only a warning.

        Args:
            sweep: Its name.
            files: {artifact name: local path}.
            scores: {trial's name: {metric: value}}.

        Returns:
            The page of the sweep's trials below the server's address; empty where it is lost.
        """
        page = ""
        try:
            for tracker in self._connected():
                if tracker.sweep == sweep:
                    tracker.close(files, scores)
                    page = tracker.page
        except Exception as error:
            reason = redacted(str(error))
            logger.warning("MLflow is not reachable, the report stays in storage: %s", reason)
        return page

    def end(self) -> None:
        """Ends the runs of stages that were stopped; a lost server is only a warning."""
        try:
            for tracker in self._connected():
                tracker.close()
        except Exception as error:
            reason = redacted(str(error))
            logger.warning("MLflow is not reachable, runs there seem to go on: %s", reason)

    def _connected(self) -> list[Tracker]:
        """Returns the trackers, connecting if that has not worked yet."""
        if not self._trackers:
            self._trackers = self._make()
        return self._trackers

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sync()
        self._sync()

    def _sync(self) -> None:
        try:
            for tracker in self._connected():
                tracker.sync()
            self._warned = False
        except Exception as error:  # the server's faults must not stop training
            if not self._warned:
                reason = redacted(str(error))
                logger.warning("MLflow is not reachable, metrics wait in storage: %s", reason)
            self._warned = True
