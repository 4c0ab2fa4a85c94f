"""The length of trainings: the length probe before a search, and the ladder before a refit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from core.config import TrainConfig
from core.data import Dataset, Division, Splits
from core.errors import DivergedError
from core.text import count
from core.tta import MOST_PASSES
from hpo.api.common import trainings
from hpo.confirmation.result import BASELINE, Confirmation
from hpo.confirmation.trials import Training, in_parts, replicated, search_epochs
from hpo.confirmation.trials import trainings as trainings_of
from hpo.paths import StudyPaths, TrainingPaths, confirmation_of
from hpo.reporter import Reporter
from hpo.search.interrupts import Interrupts
from hpo.search.length import probe_length, probed
from hpo.search.training import Watch
from hpo.storage.atomic import replacing
from hpo.study import Study, find_study
from hpo.study.settings import StudySettings
from hpo.submission.ladder import Ladder
from hpo.submission.length import REPLICATES, Budget, Climber, Site, climb, default_budget


@dataclass(frozen=True)
class Climbing:
    """Lets configurations climb the ladder, shows its rungs, and records the decision."""

    paths: StudyPaths
    metric: str
    dataset: Dataset
    device: torch.device
    reporter: Reporter
    interrupts: Interrupts
    settings: StudySettings | None = None
    left_s: Callable[[int], float] | None = None
    """Seconds that are left for the ladder together with the refit that follows, see `hpo.submission.Training`; None
    without a limit."""

    def confirmed(self, study: Study, confirmation: Confirmation) -> tuple[Ladder, TrainConfig, TrainingPaths]:
        """Compare lengths of a confirmation's winner and the baseline on its first seeds and splits; see `climb`."""
        winner = confirmation.contender(confirmation.winner)
        known, folders = _recorded(study)
        baseline = [one for one in confirmation.contenders if one.key == BASELINE and one is not winner]
        climbers = []
        for one in (winner, *baseline):
            config = one.train_config if one.trial is None else study.trained(one.trial).config
            climbers.append(Climber(one.key, one.name, config, folders.get(one.identity, {})))
        on_replicate = partial(_on_replicate, study.seed, self.dataset, in_parts(known))
        replicates = REPLICATES if winner.train_config.data.folds is None else 1
        return self._climb(climbers, search_epochs(study), on_replicate, replicates)

    def on_own_split(
        self, name: str, config: TrainConfig, trained: TrainingPaths | None
    ) -> tuple[Ladder, TrainConfig, TrainingPaths]:
        """Compare lengths of one configuration on its own seed and split; see `climb`.

        Args:
            trained: Folder of its training, if there is one.
        """
        known = trained is not None and _has_predictions(trained, config.data.folds or 1)
        climber = Climber(name, name, config, {0: trained} if known and trained is not None else {})
        return self._climb([climber], 0, lambda config, _: config, 1)

    def _climb(
        self,
        climbers: Sequence[Climber],
        search_epochs: int,
        replicate: Callable[[TrainConfig, int], TrainConfig],
        replicates: int,
    ) -> tuple[Ladder, TrainConfig, TrainingPaths]:
        if self.left_s is None:
            budget = Budget(default_budget(search_epochs, climbers))
        else:
            budget = Budget(None, max(0.0, self.left_s(MOST_PASSES)))
        self.reporter.say(
            f"comparing longer trainings of {' and '.join(one.name for one in climbers)}, ± one standard error: "
            f"{budget.limit} (skip with --epochs N)"
        )
        ladder, config, folder = climb(
            climbers,
            Site(
                self.paths,
                self.metric,
                Division(self.dataset),
                self.device,
                replicate,
                replicates,
                self._shown,
                self.reporter.say,
                self.settings,
            ),
            budget,
        )
        self.paths.ladder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.paths.ladder) as file:
            file.write_text(json.dumps(ladder.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        return ladder, config, folder

    def _shown(self, name: str, epochs: int) -> AbstractContextManager[Watch]:
        return trainings(self.reporter, name, epochs=epochs, metric=self.metric, interrupts=self.interrupts)


def run_length_probe(
    paths: StudyPaths,
    config: TrainConfig,
    splits: Splits,
    device: torch.device,
    reporter: Reporter,
    interrupts: Interrupts,
    settings: StudySettings | None = None,
    *,
    taken: bool = False,
) -> dict[str, Any] | None:
    """Train the length probe of a search, and show what it predicts.

    Args:
        config: The baseline.
        splits: On the device; of several folds the first.
        settings: None before the study exists.
        taken: Whether the caller takes the advice.

    Returns:
        The content of the setting `length_probe`; None if the baseline cannot be probed.
    """
    probe_config = probed(config)
    if probe_config is None:
        return None
    reporter.say(f"length probe: the baseline once at a constant rate, {count(config.epochs, 'epoch')}")
    shown = trainings(reporter, "length probe", epochs=config.epochs, metric="accuracy", interrupts=interrupts)
    try:
        with shown as watch:
            found = probe_length(
                probe_config, splits, paths.length_probe, device=device, watch=watch, settings=settings
            )
    except DivergedError as error:
        reporter.say(f"  no prediction: at a constant rate, {error}")
        return {"law": None, "why": str(error)}
    for line in ["no prediction: no power law fits its curve"] if found is None else found.lines(taken=taken):
        reporter.say(f"  {line}")
    return {"law": None if found is None else found.to_json()}


def _on_replicate(seed: int, dataset: Dataset, parts: bool, config: TrainConfig, replicate: int) -> TrainConfig:
    return replicated(config, replicate, seed=seed, dataset=dataset, parts=parts)


def _recorded(study: Study) -> tuple[list[Training], dict[str, dict[int, TrainingPaths]]]:
    """The trainings of a confirmation, and by identity and replicate the folders of those with kept predictions."""
    name = confirmation_of(study.name)
    found: dict[str, dict[int, TrainingPaths]] = {}
    if not StudyPaths.of(name).study_yaml.exists():
        return [], found
    confirming = find_study(name, storage_url=study.storage_url)
    known = trainings_of(confirming)
    for training in known:
        folder = TrainingPaths(confirming.paths.trial(training.number))
        if training.values is not None and _has_predictions(folder, len(training.values)):
            found.setdefault(training.identity, {})[training.replicate] = folder
    return known, found


def _has_predictions(folder: TrainingPaths, folds: int) -> bool:
    files = [folder.metrics, *(folder.validation(fold) for fold in range(1, folds + 1))]
    return all(file.exists() for file in files)
