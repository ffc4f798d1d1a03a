"""The next batch, fetched in a thread: who waits for it can look around meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()


class Ahead(Iterator[T], Generic[T]):
    """Passes items on, in order, and tells whether the next one has come.

    Its thread is left behind where nobody waits any longer: that one may still wait for Ray.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._next: Future[Any] | None = None

    def ready(self, timeout_s: float | None = None) -> bool:
        """Waits until the next item or the end has come, but not longer than this.

        Raises:
            Exception: What the source has raised instead.
        """
        if self._next is None:
            self._next = Future()
            Thread(target=self._fetch, args=[self._next], daemon=True).start()
        if not wait([self._next], timeout_s).done:
            return False
        self._next.result()
        return True

    def __next__(self) -> T:
        """Returns the next item as soon as it is there, or raises what the source has raised."""
        self.ready()
        assert self._next is not None
        item, self._next = self._next.result(), None
        if item is _END:
            raise StopIteration
        return item

    def _fetch(self, told: Future[Any]) -> None:
        """Runs in the thread."""
        try:
            told.set_result(next(self._items, _END))
        except BaseException as error:
            told.set_exception(error)
