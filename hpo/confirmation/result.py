"""The result of a confirmation, and its file `confirmation.json`, which has every score."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from core.config import TrainConfig
from core.text import count
from hpo.confirmation.statistics import Interval
from hpo.confirmation.words import NO_GAIN, beside_the_baseline, plus_minus, score
from hpo.errors import StudyError
from hpo.space.space import split_fields
from hpo.storage.atomic import replacing
from hpo.study.results import finite
from hpo.text import duration, first_fault, gap

__all__ = ["BASELINE", "Confirmation", "Contender", "is_current", "read_confirmation", "write_confirmation"]

BASELINE = "baseline"
"""Key of the configuration that all others are compared with."""
_OLD_BASELINE = "base"
"""The same key in files and storages of version 0.1.0."""

_IMPLIED_BY_NAME = ("the baseline", "a recipe")  # reasons that the contender's name repeats


def current_key(key: str) -> str:
    """Return the key of a contender in this version's spelling."""
    return BASELINE if key == _OLD_BASELINE else key


_Key = Annotated[str, BeforeValidator(current_key)]
_Value = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


def dump(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as plain JSON, as storages and `confirmation.json` have it."""
    return config.model_dump(mode="json")


def identity_of(config: Mapping[str, Any]) -> str:
    """Hash a dumped configuration without its seed and its split."""
    data = {
        name: value for name, value in split_fields(config["data"]).items() if name not in ("split_seed", "val_part")
    }
    tree = {name: value for name, value in config.items() if name != "seed"} | {"data": data}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Candidate:
    """A configuration that may be trained again."""

    key: _Key
    """`baseline`, `trial 12` or `recipe NAME`."""
    trial: int | None
    """The complete trial of the search that trained it, the best of several."""
    recipe: str | None
    chosen_for: tuple[str, ...]
    """Reasons: "best validation score", "best at epoch 6"."""
    config: dict[str, Any]
    """See `dump`; with the seed and split of the search."""
    epochs: int
    """Number of epochs for a refit: those kept by the trial."""
    search_value: float | None
    """Score in the search, on its one split."""

    @property
    def name(self) -> str:
        """Name for the user: "the baseline (trial 0)", "trial 12", "recipe NAME"."""
        if self.key != BASELINE:
            return self.key
        return "the baseline" if self.trial is None else f"the baseline (trial {self.trial})"

    @property
    def identity(self) -> str:
        return identity_of(self.config)

    @property
    def train_config(self) -> TrainConfig:
        """The configuration; pydantic's ValidationError if it has fields of another version."""
        return TrainConfig.model_validate_json(json.dumps(self.config))


@dataclass(frozen=True)
class Contender(Candidate):
    """A candidate with its scores on other seeds and splits."""

    scores: dict[int, tuple[_Value, ...]]
    """The value of each fold (one without folds) by replicate; NaN (null in JSON) if a training failed."""
    stopped: str | None
    """Why no further replicates were trained."""
    failure: str | None
    """Why it could not be trained."""
    interval: Interval | None


@dataclass(frozen=True)
class Confirmation:
    """The winner, the evidence for it, and the cost."""

    study: str
    metric: str
    direction: str
    """`maximize` or `minimize`."""
    contenders: tuple[Contender, ...]
    """The best first."""
    leader: str | None
    """Key of the best challenger; None if there was none."""
    winner: _Key
    """What a refit trains: the leader if its expected gain is above the margin; otherwise the baseline."""
    evidence: bool
    """Whether the leader beats the baseline significantly."""
    advantage: Interval | None
    """The leader over the baseline (positive: better), for all challengers at once."""
    optimism: float | None
    """How much better the best score of the search is than the confirmed score of the same trial."""
    search_epochs: int
    budget_epochs: int
    epochs: int
    trainings: int
    replicates: int
    elapsed_s: float
    left_out: tuple[str, ...]
    """One sentence for each candidate that was not confirmed, with the reason."""
    search_trials: int
    """Finished trials of the search at that time."""
    created: str
    versions: dict[str, str]
    on_given_val: bool = False
    """Whether all replicates validate on the images that the data give, so that only their seeds differ."""
    out_of_time: bool = False
    """Whether a time limit left planned trainings out."""
    test_share: float | None = None
    """Validation images / training images of one split, which widens intervals; None in files of older versions."""
    per_repeat: int = 1
    """Number of replicates whose validation images are disjoint; 1 if all are drawn freely, as by older versions."""
    resolution: float = 0.0
    """Smallest change of a score: one validation image."""
    expected: float | None = None
    """Expected gain of the leader over the baseline (positive: better); None in files of older versions."""
    margin: float = 0.0
    """Of the search space: a smaller expected gain is not worth leaving the baseline."""

    def contender(self, key: str) -> Contender:
        """Return the contender with a key; KeyError if there is none."""
        return {contender.key: contender for contender in self.contenders}[key]

    @property
    def challengers(self) -> int:
        return sum(one.key != BASELINE for one in self.contenders)

    @property
    def searched_best(self) -> Contender | None:
        """The contender with the best score in the search; None if none was a trial of it."""
        return searched_best(self.contenders, maximize=self.direction == "maximize")

    def to_json(self) -> dict[str, Any]:
        """Return the content of `confirmation.json`: the verdict and all fields, with null for NaN and infinity."""
        return {"verdict": self.verdict, **finite(dataclasses.asdict(self))}

    @classmethod
    def from_json(cls, content: Any) -> Confirmation:
        """Rebuild a confirmation; ValueError with one line if the content is none, or contradicts itself."""
        try:
            found = _ADAPTER.validate_python(content)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from error
        keys = [one.key for one in found.contenders]
        if len(set(keys)) < len(keys):
            raise ValueError(f"contenders: two have the same key, of {keys}")
        for name, key in (("winner", found.winner), ("leader", found.leader)):
            if key is not None and key not in keys:
                raise ValueError(f"{name}: {key!r} is not among the contenders")
        if found.direction not in ("maximize", "minimize"):
            raise ValueError(f"direction: {found.direction!r} is neither maximize nor minimize")
        return found

    @property
    def verdict(self) -> str:
        """The result in one sentence: "0.912 ± 0.004 (n = 5), better than the baseline by 0.031 ± 0.006"."""
        winner = score(self.contender(self.winner).interval)
        if self.leader == self.winner:
            if self.advantage is None:
                return f"{winner}, without a comparison: the baseline could not be trained"
            if self.evidence:
                return f"{winner}, better than the baseline by {plus_minus(self.advantage)}"
            bet = f"{self.expected:+.2g} expected over the baseline; "
            return f"{winner}, the best bet: {bet}not a proven gain ({plus_minus(self.advantage)})"
        if not self.challengers:
            trained = self.contender(self.winner).interval is not None
            return f"{NO_GAIN}: no other trial was compared with the baseline" + (f", {winner}" if trained else "")
        if self.leader is None or self.advantage is None:
            out = "the only challenger was" if self.challengers == 1 else f"all {self.challengers} challengers were"
            return f"{NO_GAIN}: {out} stopped or failed; the baseline scores {winner}"
        best = self.leader if self.challengers == 1 else f"{self.leader}, the best of {self.challengers} challengers,"
        return f"{NO_GAIN}: {best} {beside_the_baseline(self.advantage)}{self._below_margin()}"

    def _below_margin(self) -> str:
        if self.expected is None or not 0 < self.expected <= self.margin:
            return ""
        return f", {self.expected:+.2g} expected, and the space asks for more than {self.margin:g}"

    def lines(self) -> list[str]:
        """Describe the whole result, a sentence per line, for the terminal, the report and the model card."""
        if not self.trainings:
            return [*self.headline(), "nothing was trained again"]
        return [
            *self.headline(),
            *(f"  {line}" for line in self._contenders()),
            *self._optimism(),
            self._cost(),
            *(f"left out: {sentence}" for sentence in self.left_out),
            *(["the time limit ended it before all planned trainings"] if self.out_of_time else []),
            *self._footnotes(),
        ]

    def headline(self) -> list[str]:
        """Name the winner, after the verdict if that is about another trial."""
        winner = self.contender(self.winner)
        if self.leader == self.winner:
            return [f"the winner is {winner.name}: {self.metric} {self.verdict}"]
        scored = "" if winner.interval is None else f": {self.metric} {score(winner.interval)}"
        return [self.verdict, f"the winner is {winner.name}{scored}"]

    def _contenders(self) -> Iterator[str]:
        for one in self.contenders:
            parts = [f"{one.name}: {score(one.interval)}"]
            reasons = [reason for reason in one.chosen_for if reason not in _IMPLIED_BY_NAME]
            if reasons:
                parts.append(", ".join(reasons))
            if one.failure is not None:
                parts.append(f"could not be trained: {one.failure}")
            if one.stopped is not None:
                parts.append(f"stopped early: {one.stopped}")
            yield "; ".join(parts)

    def _optimism(self) -> Iterator[str]:
        best = self.searched_best
        if best is None or best.search_value is None or self.optimism is None:
            return
        head = f"the best score of the search, {best.search_value:.4f} of {best.name},"
        size = gap(self.metric, abs(self.optimism))
        if float(size.split()[0]) == 0:
            yield f"{head} was confirmed"
        elif self.optimism > 0:
            yield f"{head} was {size} too {'high' if self.direction == 'maximize' else 'low'}"
        else:
            yield f"{head} was not too optimistic: the confirmed score is {size} better"

    def _cost(self) -> str:
        cost = f"cost: {count(self.trainings, 'training')}, {count(self.epochs, 'epoch')}"
        if self.search_epochs:
            share = 100 * self.epochs / self.search_epochs
            cost += f", {share:.0f} % of the search's {self.search_epochs:,}"
        if self.epochs > self.budget_epochs:
            cost += f" (the budget was {self.budget_epochs:,})"
        return f"{cost}, {duration(self.elapsed_s)}"

    def _footnotes(self) -> Iterator[str]:
        if self.replicates < 2:
            yield "n = 1: one replicate gives no interval"
            return
        varied = "seeds and splits, corrected for overlapping splits (Nadeau and Bengio 2003)"
        if self.per_repeat > 1:
            varied = "seeds and folds of a repeated k-fold, corrected for their overlap (Bouckaert and Frank 2004)"
        if self.on_given_val:
            varied = "seeds on the given validation images, whose choice it does not include"
        yield f"± is a 95 % interval over n {varied}"
        if self.advantage is not None and self.challengers > 1:
            yield f"the interval of the advantage holds for all {self.challengers} challengers at once (Bonferroni)"


_ADAPTER = TypeAdapter(Confirmation)


def searched_best(contenders: Iterable[Contender], *, maximize: bool) -> Contender | None:
    """Return the contender with the best score in the search, the first of equals.

    Recipes trained beside the search are skipped: they were not selected by their score.
    """
    sign = 1 if maximize else -1
    scored = [
        (sign * one.search_value, -one.trial, one)
        for one in contenders
        if one.trial is not None and one.search_value is not None and math.isfinite(one.search_value)
    ]
    return max(scored, key=lambda ranked: ranked[:2], default=(None, None, None))[2]


def write_confirmation(path: Path, confirmation: Confirmation) -> None:
    """Write `confirmation.json` atomically."""
    text = json.dumps(confirmation.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_confirmation(path: Path) -> Confirmation | None:
    """Read `confirmation.json`; None if there is no such file, StudyError if it is damaged."""
    try:
        return Confirmation.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, or no confirmation
        first = str(error).partition("\n")[0]
        raise StudyError(
            f"{path}: cannot be read ({first}); remove it and run `hpo confirm {path.parent.name}` again"
        ) from error


def is_current(confirmation: Confirmation, finished: int) -> bool:
    """Whether the search has no more finished trials than at the time of the confirmation."""
    return confirmation.search_trials == finished
