"""The time limit of a study. It is kept in the storage, so it survives kills and applies to every worker."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.study.settings import StudySettings

# Seconds between two records of the used time, which is as much as a killed run may lose.
RECORD_EVERY_S = 10.0


class OutOfTime(KeyboardInterrupt):
    """The study's time limit ends a trial, or does not allow it to begin."""


class TooLong(OutOfTime):
    """A trial has not begun, since it would end too late."""


class Deadline:
    """The time that a study's runs may take together. The time between two runs does not count."""

    def __init__(self, settings: StudySettings) -> None:
        self._settings = settings
        self._made_at, self._recorded_at = time.monotonic(), -math.inf

    def begin(self, limit_s: float | None) -> None:
        """Begin or resume a run with a limit of seconds for all runs of the study; None removes the limit."""
        if limit_s is None:
            self._settings.deadline = None
            return
        used_s = self.used_s
        self._settings.deadline = {"limit_s": limit_s, "used_s": used_s, "ends_at": time.time() + limit_s - used_s}

    def reserve(self, seconds: float) -> None:
        """Keep seconds at the end of the run for trainings that are no trials."""
        if self._settings.deadline is not None:
            self._settings.deadline = {**self._settings.deadline, "reserved_s": seconds}

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self._settings.deadline is not None

    @property
    def limit_s(self) -> float:
        """The limit in seconds; infinite without one."""
        found = self._settings.deadline
        return math.inf if found is None else float(found["limit_s"])

    @property
    def used_s(self) -> float:
        """Seconds used as of the last record."""
        found = self._settings.deadline
        return 0.0 if found is None else float(found["used_s"])

    def left_s(self, *, trials: bool = True) -> float:
        """Return the seconds until the end, for trials without those reserved; infinite without a limit."""
        found = self._settings.deadline
        if found is None:
            return math.inf
        return float(found["ends_at"]) - time.time() - (float(found.get("reserved_s", 0.0)) if trials else 0.0)

    def check(self, seconds: float, *, trials: bool = True) -> None:
        """Raise OutOfTime if work of so many seconds would end too late; `trials` as in `left_s`."""
        if seconds > self.left_s(trials=trials):
            raise OutOfTime

    def record(self, *, force: bool = False) -> None:
        """Store the used time, unless that was done a short time ago."""
        now = time.monotonic()
        if now - self._recorded_at < RECORD_EVERY_S and not force:
            return
        elapsed_s = now - max(self._made_at, self._recorded_at)
        self._recorded_at = now
        found = self._settings.deadline
        if found is None:
            return
        # The clock may have been set: it uses up no time that has not passed.
        used_s = min(found["limit_s"] - (found["ends_at"] - time.time()), found["used_s"] + elapsed_s)
        self._settings.deadline = {**found, "used_s": min(max(used_s, found["used_s"]), found["limit_s"])}
