"""What an error stands for, below all that Ray wraps around it, and how people are told of it."""

from __future__ import annotations

import sysconfig
import traceback

from kdscale.core.types import (
    CheckpointError,
    ConfigError,
    DataError,
    KdscaleError,
    TrainingDiverged,
    WeightsError,
)

# Errors that lie in what was asked for, or in files as they are: trying again meets them again.
FINAL_ERRORS = (ConfigError, DataError, WeightsError, CheckpointError, TrainingDiverged)
WRAPPED = ("cause", "controller_failure")
LIBRARIES = ("<", "site-packages", "dist-packages", sysconfig.get_paths()["stdlib"])


def final_cause(error: BaseException) -> BaseException | None:
    """Returns the innermost of `FINAL_ERRORS` that an error stands for, None where none is."""
    return _innermost(error, FINAL_ERRORS)


def named_cause(error: BaseException) -> BaseException | None:
    """Returns the innermost error of our own that an error stands for, None where there is none."""
    return _innermost(error, (KdscaleError,))


def in_words(error: BaseException) -> str:
    """Tells an error in a line: our own, else the innermost one, with its place if noted."""
    own = named_cause(error)
    found = own or _innermost(error, (BaseException,)) or error
    text = str(found).strip().splitlines()
    notes: list[str] = [] if own else getattr(found, "__notes__", [])
    return " ".join([f"{type(found).__name__}: {text[-1] if text else ''}".strip(), *notes])


def note_place(error: BaseException) -> None:
    """Notes in an error where it arose, which its traceback does not tell another process.

    Of the frames the innermost counts that is in no library: a wrong shape is noticed by torch.
    """
    found = _innermost(error, (BaseException,)) or error
    frames = traceback.extract_tb(found.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in LIBRARIES)]
    if frames:
        place = (own or frames)[-1]
        found.add_note(f"({place.filename}:{place.lineno}, in {place.name})")


def _innermost(error: BaseException, kinds: tuple[type, ...]) -> BaseException | None:
    """Looks through what Ray wraps around errors of tasks, workers and controllers."""
    failures: dict[int, object] = getattr(error, "worker_failures", {})
    inner = [error.__cause__, *(getattr(error, name, None) for name in WRAPPED)]
    for cause in [*inner, *failures.values()]:
        if isinstance(cause, BaseException) and cause is not error:
            found = _innermost(cause, kinds)
            if found is not None:
                return found
    return error if isinstance(error, kinds) else None
