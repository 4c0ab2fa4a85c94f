"""The decision on the length of a refit, with the rungs that it rests on, as text and as a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from core.metrics import Gain
from core.text import count
from hpo.errors import StudyError
from hpo.study.results import finite
from hpo.text import METRIC_WORDS, duration


@dataclass(frozen=True)
class Rung:
    """The trainings of one length."""

    key: str
    name: str
    epochs: int
    score: float
    """On the validation images of all replicates together; NaN if a training failed."""
    gain: Gain | None
    """Over half the epochs, on the same images; None at the first length and for a failure."""
    replicates: int
    elapsed_s: float
    """Duration of its trainings."""
    failure: str | None = None
    """Why it could not be trained."""

    @property
    def climbs(self) -> bool:
        """Whether the gain is beyond its standard error."""
        return self.gain is not None and self.gain.value > self.gain.error

    def line(self, metric: str) -> str:
        """Describe it in one line."""
        head = f"{self.name}, {count(self.epochs, 'epoch')}"
        if self.failure is not None:
            return f"{head}: could not be trained: {self.failure}"
        gain = "" if self.gain is None else f", {_plus_minus(self.gain)} over {self.epochs // 2}"
        where = f"n = {self.replicates}, {duration(self.elapsed_s)}"
        return f"{head}: {METRIC_WORDS[metric]} {self.score:.4f}{gain} ({where})"


@dataclass(frozen=True)
class Ladder:
    """A decision on the length of a refit, and its evidence."""

    metric: str
    rungs: tuple[Rung, ...]
    """In the order of their trainings."""
    chosen: str
    """Key of the configuration to refit."""
    name: str
    epochs: int
    """Of the chosen configuration."""
    searched: int
    """Epochs of the chosen configuration in the search."""
    ended: str
    """Why no longer training was tried."""
    other: str | None = None
    """Name of the configuration that was not chosen; None if there was only one."""
    ahead: Gain | None = None
    """Gain of the baseline over the winner at their lengths; None if neither climbed, or there was only one."""

    @property
    def verdict(self) -> str:
        """The decision in one sentence."""
        times = self.epochs // self.searched
        if times == 1:
            return f"{self.name} is refitted at the length of the search, {count(self.epochs, 'epoch')}"
        return f"{self.name} is refitted for {count(self.epochs, 'epoch')}, {times} times as many as in the search"

    def lines(self) -> list[str]:
        """Describe all rungs and the decision, a sentence per line."""
        found = [rung.line(self.metric) for rung in self.rungs]
        found.append(f"the ladder ends: {self.ended}")
        if self.ahead is not None:
            by = _plus_minus(self.ahead)
            if self.ahead.value > self.ahead.error:
                found.append(f"{self.name} is refitted instead of {self.other}: at these lengths it is better by {by}")
            else:
                found.append(f"at these lengths {self.other} is not better than {self.name} beyond the error: {by}")
        return [*found, self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict and all fields, with null for NaN."""
        return {"verdict": self.verdict, **finite(asdict(self))}

    @classmethod
    def from_json(cls, content: Any) -> Ladder:
        """Rebuild it; pydantic's ValidationError if the content is no ladder."""
        rungs = [{**rung, "score": math.nan} if rung["score"] is None else rung for rung in content["rungs"]]
        return _ADAPTER.validate_python({**content, "rungs": rungs})


_ADAPTER = TypeAdapter(Ladder)


def read_ladder(path: Path) -> Ladder | None:
    """Read a ladder's file; None if there is none, StudyError if it is damaged."""
    if not path.exists():
        return None
    try:
        return Ladder.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path}: cannot be read; delete it, and hpo refit writes it again") from error


def _plus_minus(gain: Gain) -> str:
    return f"{gain.value:+.4f} ± {gain.error:.4f}"
