"""What came of training the best configurations again: `confirmation.json`, and the same in words.

One file holds every score of every replicate, so that the verdict can be checked by whoever doubts it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hpo.confirmation.statistics import Interval
from hpo.errors import StudyError
from hpo.storage.atomic import replacing
from hpo.text import count, duration, gap

__all__ = ["Confirmation", "Contender", "is_current", "read_confirmation", "write_confirmation"]

BASE = "base"
"""The key of the configuration that all others are compared with."""

NO_EVIDENCE = "no evidence that tuning helped"
"""How the verdict begins where the base wins."""

# Reasons that a contender's name says already.
_NO_SCORE = "no score"
_SAID_BY_KEY = ("the base", "a recipe")

# Decimals of a score: three say a tenth of a point; more where two numbers would look alike that are not.
_DECIMALS, _MOST_DECIMALS = 3, 6


@dataclass(frozen=True)
class Contender:
    """One configuration, and what it scored on other seeds and splits."""

    key: str
    """`base`, `trial 12` or `recipe NAME`."""
    trial: int | None
    """Its number in the search's study; the base's too, where it was a trial."""
    recipe: str | None
    """A recipe's name."""
    chosen_for: tuple[str, ...]
    """Why it is here, in words: "best validation score", "best at epoch 6"."""
    config: dict[str, Any]
    """The whole configuration, as `TrainConfig.model_dump(mode="json")` has it."""
    epochs: int
    """That a refit trains: what the search's trial kept."""
    search_value: float | None
    """What the search saw of it, on its one split."""
    scores: dict[int, tuple[float, ...]]
    """Replicate -> the value of each fold (one without folds). NaN where a training failed."""
    stopped: str | None
    """Why no more replicates were trained."""
    failure: str | None
    """Why it could not be trained."""
    interval: Interval | None
    """Of its own score; None where it has none."""

    @property
    def name(self) -> str:
        """What a person calls it: "the base (trial 0)", "trial 12", "recipe NAME"."""
        if self.key != BASE:
            return self.key
        return "the base" if self.trial is None else f"the base (trial {self.trial})"


@dataclass(frozen=True)
class Confirmation:
    """Who won, how sure that is, and what it cost to know."""

    study: str
    metric: str
    direction: str
    """`maximize` or `minimize`."""
    contenders: tuple[Contender, ...]
    """The best first."""
    leader: str | None
    """The best challenger; None where there was none."""
    winner: str
    """The leader where there is evidence that it beats the base; else the base, unless that could not be trained."""
    evidence: bool
    advantage: Interval | None
    """The leader over the base, positive where it is better; it holds for all challengers at once."""
    optimism: float | None
    """How much better the search's own best score is than what the same trial was confirmed to score."""
    search_epochs: int
    budget_epochs: int
    epochs: int
    trainings: int
    replicates: int
    """The most that any configuration was trained."""
    elapsed_s: float
    left_out: tuple[str, ...]
    """What was not confirmed, and why, a sentence each."""
    search_trials: int
    """Finished trials of the search when this was made."""
    created: str
    versions: dict[str, str]

    def contender(self, key: str) -> Contender:
        """The contender of this key.

        Raises:
            KeyError: there is none.
        """
        for contender in self.contenders:
            if contender.key == key:
                return contender
        raise KeyError(key)

    @property
    def searched_best(self) -> Contender | None:
        """The contender that is the search's best trial; None where none of them was a trial of it."""
        return searched_best(self.contenders, maximize=self.direction == "maximize")

    @property
    def verdict(self) -> str:
        """The result in one sentence: "0.912 ± 0.004 (n = 5), better than the base by 0.031 ± 0.006"."""
        winner = _score(self.contender(self.winner).interval)
        if self.leader == self.winner:
            if self.advantage is None:
                return f"{winner}, but compared with nothing: the base could not be trained"
            return f"{winner}, better than the base by {_plus_minus(self.advantage)}"
        return f"{NO_EVIDENCE}: {self._why_not(winner)}"

    def _why_not(self, base: str) -> str:
        """Why the base is the winner, which scored as the words say."""
        challengers = sum(one.key != BASE for one in self.contenders)
        if not challengers:
            alone = "nothing was compared with the base"
            return f"{alone}, since no other trial is complete" if base == _NO_SCORE else f"{alone}, {base}"
        if self.leader is None or self.advantage is None:
            left = "the one challenger is" if challengers == 1 else f"all {challengers} challengers are"
            return f"{left} out, and the base is left, {base}"
        ahead = self.advantage
        best = self.leader if challengers == 1 else f"{self.leader}, the best of {challengers} challengers,"
        size = _plus_minus(dataclasses.replace(ahead, mean=abs(ahead.mean)))
        level = float(size.partition(" ")[0]) == 0  # as it is shown
        how = "level with the base," if level else f"{'ahead of' if ahead.mean > 0 else 'behind'} the base by"
        sized = f"{best} is {how} {size} (n = {ahead.n})"
        if not math.isfinite(ahead.half_width):
            cause = "one replicate gives" if ahead.n < 2 else "equal differences give"
            return f"{sized}, and {cause} no interval"
        return f"{sized}, which may be chance" if ahead.mean > 0 and not level else sized

    def lines(self) -> list[str]:
        """The whole result in words, a line each: for a terminal and a model card."""
        if not self.trainings:
            return [*self._headline(), "nothing was trained again"]
        return [
            *self._headline(),
            *(f"  {line}" for line in self._standings()),
            *self._optimism(),
            self._cost(),
            *(f"left out: {what}" for what in self.left_out),
            *self._footnotes(),
        ]

    def _headline(self) -> Iterator[str]:
        winner = self.contender(self.winner)
        if self.leader == self.winner:
            yield f"the winner is {winner.name}: {self.metric} {self.verdict}"
        else:
            yield self.verdict
            scored = "" if winner.interval is None else f": {self.metric} {_score(winner.interval)}"
            yield f"the winner is {winner.name}{scored}"

    def _standings(self) -> Iterator[str]:
        for one in self.contenders:
            words = [f"{one.name}: {_score(one.interval)}"]
            reasons = [reason for reason in one.chosen_for if reason not in _SAID_BY_KEY]
            if reasons:
                words.append(", ".join(reasons))
            if one.failure is not None:
                words.append(f"could not be trained: {one.failure}")
            if one.stopped is not None:
                words.append(f"stopped early: {one.stopped}")
            yield "; ".join(words)

    def _optimism(self) -> Iterator[str]:
        best = self.searched_best
        if best is None or best.search_value is None or self.optimism is None:
            return
        head = f"the search's own best score, {best.search_value:.4f} of {best.name},"
        size = gap(self.metric, abs(self.optimism))
        if float(size.split()[0]) == 0:
            yield f"{head} was confirmed"
        elif self.optimism > 0:
            yield f"{head} was {size} too {'high' if self.direction == 'maximize' else 'low'}"
        else:
            yield f"{head} did not flatter: it was confirmed {size} better"

    def _cost(self) -> str:
        cost = f"it cost {count(self.trainings, 'training')}, {count(self.epochs, 'epoch')} in all"
        if self.search_epochs:
            share = 100 * self.epochs / self.search_epochs
            cost += f", {share:.0f} % of the search's {self.search_epochs:,}"
        if self.epochs > self.budget_epochs:
            cost += f" (the budget was {self.budget_epochs:,})"
        return f"{cost}, and {duration(self.elapsed_s)}"

    def _footnotes(self) -> Iterator[str]:
        challengers = sum(one.key != BASE for one in self.contenders)
        if self.replicates < 2:
            yield "n = 1: one replicate gives no interval"
            return
        yield "± is a 95 % interval over n seeds and splits, corrected for overlapping splits (Nadeau and Bengio 2003)"
        if self.advantage is not None and challengers > 1:
            yield f"that of the advantage over the base holds for all {challengers} challengers at once (Bonferroni)"

    def to_json(self) -> dict[str, Any]:
        """What `confirmation.json` holds: the verdict, and every field.

        NaN and infinity, which are no JSON, are null.
        """
        content: dict[str, Any] = _finite(dataclasses.asdict(self))
        return {"verdict": self.verdict, **content}

    @classmethod
    def from_json(cls, content: Any) -> Confirmation:
        """The confirmation that `to_json` made the content of.

        Raises:
            ValueError: the content is no confirmation, or contradicts itself; one line.
        """
        try:
            found = _ADAPTER.validate_python(_with_infinities(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error
        keys = [one.key for one in found.contenders]
        if len(set(keys)) < len(keys):
            raise ValueError(f"contenders: two have the same key, of {keys}")
        for name, key in (("winner", found.winner), ("leader", found.leader)):
            if key is not None and key not in keys:
                raise ValueError(f"{name}: {key!r} is not among the contenders")
        if found.direction not in ("maximize", "minimize"):
            raise ValueError(f"direction: {found.direction!r} is neither maximize nor minimize")
        return found


_ADAPTER = TypeAdapter(Confirmation)


def searched_best(contenders: Iterable[Contender], *, maximize: bool) -> Contender | None:
    """The best trial of the search among these, of equals the first; None where none was one.

    A recipe that was trained beside the search is the best of nothing, so its score is no more flattering than any.
    """
    sign = 1 if maximize else -1
    scored = [
        (sign * one.search_value, -one.trial, one)
        for one in contenders
        if one.trial is not None and one.search_value is not None and math.isfinite(one.search_value)
    ]
    return max(scored, key=lambda ranked: ranked[:2], default=(None, None, None))[2]


def write_confirmation(path: Path, confirmation: Confirmation) -> None:
    """Writes the file, whole or not at all."""
    text = json.dumps(confirmation.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_confirmation(path: Path) -> Confirmation | None:
    """What the file says; None where there is none.

    Raises:
        StudyError: the file is damaged, or was written by something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(_unreadable(path, str(error))) from error
    try:
        return Confirmation.from_json(json.loads(text))
    except ValueError as error:  # of which json.JSONDecodeError is one
        raise StudyError(_unreadable(path, str(error))) from error


def is_current(confirmation: Confirmation, finished: int) -> bool:
    """Whether the search has as many finished trials as when this was made."""
    return confirmation.search_trials == finished


def _unreadable(path: Path, why: str) -> str:
    first = why.partition("\n")[0]
    return f"{path}: cannot be read ({first}); remove it and run `hpo confirm {path.parent.name}` again"


def _score(interval: Interval | None) -> str:
    """ "0.912 ± 0.004 (n = 5)"."""
    if interval is None:
        return _NO_SCORE
    return f"{_plus_minus(interval)} (n = {interval.n}{'' if math.isfinite(interval.half_width) else ', no interval'})"


def _plus_minus(interval: Interval) -> str:
    """ "0.912 ± 0.004", with so many decimals that the half width is no zero, and larger or smaller than the mean as
    it is; without a half width, the mean alone."""
    if not math.isfinite(interval.half_width):
        return f"{interval.mean:.{_DECIMALS}f}"
    for decimals in range(_DECIMALS, _MOST_DECIMALS + 1):
        mean, half = round(interval.mean, decimals), round(interval.half_width, decimals)
        if half > 0 and (abs(mean) > half) == (abs(interval.mean) > interval.half_width):
            break
    return f"{interval.mean:.{decimals}f} ± {interval.half_width:.{decimals}f}"


def _finite(content: Any) -> Any:
    """The same without what JSON has no number for."""
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _with_infinities(content: Any) -> Any:
    """What `_finite` took out, put back where the fields need numbers: half widths (infinite) and scores (NaN)."""
    if not isinstance(content, dict):
        return content
    contenders = content.get("contenders")
    if isinstance(contenders, list):
        contenders = [_contender_with_infinities(one) for one in contenders]
    return content | {"contenders": contenders, "advantage": _interval_with_infinity(content.get("advantage"))}


def _contender_with_infinities(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    scores = content.get("scores")
    if isinstance(scores, dict):
        scores = {replicate: _with_nan(values) for replicate, values in scores.items()}
    return content | {"scores": scores, "interval": _interval_with_infinity(content.get("interval"))}


def _with_nan(values: Any) -> Any:
    return [math.nan if value is None else value for value in values] if isinstance(values, list) else values


def _interval_with_infinity(content: Any) -> Any:
    if isinstance(content, dict) and content.get("half_width", 0.0) is None:
        return content | {"half_width": math.inf}
    return content
