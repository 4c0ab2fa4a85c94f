"""Studies and confirmations whose scores come from a formula in place of a training."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from core.config import DataConfig, TrainConfig
from core.data import DataReport
from hpo.confirmation.result import BASELINE as BASELINE_KEY
from hpo.confirmation.result import Confirmation, Contender
from hpo.confirmation.statistics import Interval
from hpo.paths import StudyPaths
from hpo.space import SearchSpace, load_space
from hpo.study import Study, open_study
from hpo.study.metadata import new_metadata
from hpo.trials import BASELINE, TRIAL_INDEX

Score = Callable[[Mapping[str, Any], random.Random], float]


@dataclass(frozen=True)
class Images:
    """The part of a data set that a study reads."""

    name: str = "digits"
    fingerprint: str = "ab" * 32
    classes: tuple[str, ...] = ("0", "1")
    report: Any = field(default_factory=DataReport)
    images: Any = None
    stamp: str = "digits"
    content: Mapping[str, tuple[str, int] | None] = field(default_factory=dict)

    def checksums(self) -> Mapping[str, tuple[str, int] | None]:
        """The class and the checksum of each image."""
        return self.content

    def given_val(self, config: DataConfig) -> None:
        """Validation images are drawn."""

    def gives_val(self, config: DataConfig) -> bool:
        """Whether they are not."""
        return False


def space_of(folder: Path, text: str, name: str = "space") -> SearchSpace:
    """The search space of this text, in a file of its own."""
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return load_space(file)


def in_memory(space: SearchSpace, *, name: str = "simulated") -> Study:
    """A study of the space that no file holds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    images: Any = Images()
    metadata = new_metadata(space, images, seed=0, data_path=None)
    return Study(optuna.create_study(direction=space.direction), StudyPaths.of(name), metadata, "memory", space)


def on_disk(space: SearchSpace, *, name: str = "simulated", **options: Any) -> Study:
    """A study of the space with its journal."""
    study = open_study(space, name=name, **{"dataset": Images(), **options})
    study.settings.set_space(space)
    return study


def add_trials(
    study: Study, space: SearchSpace, score: Score, *, trials: int, seed: int = 0, pruned: float = 0.0
) -> None:
    """Adds finished trials with evenly drawn parameters, the first of them the base.

    Args:
        pruned: the share of those worse than the median so far that are pruned in their first epoch.
    """
    rng = random.Random(seed)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    scratch = optuna.create_study(sampler=sampler)
    sign = 1 if space.direction == "maximize" else -1
    values: list[float] = []
    for trial_index in range(trials):
        drawn = scratch.ask()
        params = space.baseline_params() if trial_index == 0 else (space.suggest(drawn), drawn.params)[1]
        value = score(params, rng)
        worse = bool(values) and sign * value < sorted(sign * known for known in values)[len(values) // 2]
        values.append(value)
        cut = trial_index > 0 and worse and rng.random() < pruned
        study.optuna.add_trial(
            create_trial(
                state=TrialState.PRUNED if cut else TrialState.COMPLETE,
                value=value,
                params=params,
                distributions={path: space.distributions[path] for path in params},
                intermediate_values={1: value},
                user_attrs={TRIAL_INDEX: trial_index, **({BASELINE: True} if trial_index == 0 else {})},
            )
        )


def some_contender(key: str, config: TrainConfig, mean: float, **changes: Any) -> Contender:
    """A contender of three replicates. `changes` are fields with other values."""
    kind, _, name = key.partition(" ")
    fields: dict[str, Any] = {
        "trial": 0 if key == BASELINE_KEY else int(name) if kind == "trial" else None,
        "recipe": name if kind == "recipe" else None,
        "chosen_for": ("a test",),
        "config": config.model_dump(mode="json"),
        "epochs": config.epochs,
        "search_value": mean,
        "scores": {1: (mean - 0.01,), 2: (mean,), 3: (mean + 0.01,)},
        "stopped": None,
        "failure": None,
        "interval": Interval(mean, 0.02, 3),
    }
    return Contender(key=key, **(fields | changes))


def some_confirmation(
    *contenders: Contender, evidence: bool, advantage: Interval | None, **changes: Any
) -> Confirmation:
    """A confirmation led by the first contender, who wins if it is ahead. `changes` are fields with other values."""
    lead = 0.0 if advantage is None else advantage.mean
    fields: dict[str, Any] = {
        "study": "own",
        "metric": "accuracy",
        "direction": "maximize",
        "leader": contenders[0].key,
        "winner": contenders[0].key if lead > 0 else BASELINE_KEY,
        "expected": lead / 2,
        "optimism": 0.01,
        "search_epochs": 6,
        "budget_epochs": 2,
        "epochs": 12,
        "trainings": 6,
        "replicates": 3,
        "elapsed_s": 1.0,
        "left_out": (),
        "search_trials": 3,
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
    }
    return Confirmation(contenders=contenders, evidence=evidence, advantage=advantage, **(fields | changes))
