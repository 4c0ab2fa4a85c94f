"""The weights of a study's best trials, and disk space."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from optuna.trial import TrialState
from safetensors.torch import save_model

from core.data import Splits
from hpo.errors import FULL_DISK, HpoError, StudyError
from hpo.search.held_out import outputs_of, write_outputs
from hpo.search.options import TrialOptions
from hpo.storage.atomic import replacing
from hpo.study import Study
from hpo.trials import Order, Outcome, best_first, order_of, trial_index_of

logger = logging.getLogger(__name__)

DEFAULTS = TrialOptions()


def keep_weights(study: Study, splits: Sequence[Splits], outcome: Outcome, keep: int = DEFAULTS.keep) -> None:
    """Keep the weights of a trial among the `keep` best, and delete those that no longer are."""
    assert outcome.value is not None
    orders = _orders(study)
    before = _best_of(orders, keep)
    orders[outcome.number] = order_of(outcome.value, outcome.attributes, outcome.trial_index, study.sign)
    best = _best_of(orders, keep)
    folds = range(1, len(outcome.results) + 1)
    if outcome.number in best:
        for fold, result, divided in zip(folds, outcome.results, splits, strict=True):
            write_outputs(study.paths.trial_validation(outcome.number, fold), result, divided)
        for fold, result in zip(folds, outcome.results, strict=True):
            with replacing(study.paths.trial_model(outcome.number, fold)) as weights:
                save_model(result.model, str(weights))
        for file in study.paths.needed_by_refit(outcome.number):
            study.files.share(file)
    # Those that this trial displaced. Weights that two workers kept at the same time are deleted when the run ends.
    _delete(study, set(before) - set(best), folds=len(folds))


def keep_evidence(study: Study, splits: Sequence[Splits], outcome: Outcome) -> None:
    """Write the outputs of a confirmation's training, with all its averages and views, for the refit."""
    assert outcome.config is not None, "it was trained"
    for fold, (result, divided) in enumerate(zip(outcome.results, splits, strict=True), 1):
        file = study.paths.trial_validation(outcome.number, fold)
        write_outputs(file, result, divided, outputs_of(result, outcome.config, divided))
        study.files.share(file)
    study.files.share(study.paths.trial_metrics(outcome.number))


def keep_best_weights(study: Study, *, folds: int, options: TrialOptions = DEFAULTS) -> None:
    """Delete weights beyond the best trials', which two workers kept at once, and those beyond `keep_gb`."""
    orders = _orders(study)
    _delete(study, orders.keys() - set(_best_of(orders, options.keep)), folds=folds)
    SpaceOnDisk(study, options).keep_within()


class SpaceOnDisk:
    """Keeps a study's weights and checkpoints within a limit in 10^9 bytes, if there is one.

    The checkpoints of the worst paused trials go first: if promoted after all, they start over. Then the weights of the
    worst trials: a refit trains again what is missing. The checkpoints of running trials are never deleted.
    """

    def __init__(self, study: Study, options: TrialOptions) -> None:
        self._study, self.options = study, options
        self._keep_gb = options.keep_gb
        self._warned = False

    def keep_within(self) -> None:
        if self._keep_gb is None:
            return
        sizes = {path: _size(path) for path in self._study.paths.weights_and_checkpoints()}
        excess = sum(sizes.values()) - self._keep_gb * 1e9
        for trial in reversed(self._study.queue.paused() if excess > 0 else []):
            checkpoints = self._study.paths.checkpoints_of(trial_index_of(trial))
            if excess > 0 and checkpoints:
                logger.info("--keep-gb %g: deleting the checkpoint of paused trial %d", self._keep_gb, trial.number)
                excess -= self._delete(checkpoints, sizes)
        orders, unknown = _orders(self._study), (math.inf, math.inf)
        kept = self._study.paths.numbers_with_weights()
        for number in sorted(kept, key=lambda n: orders.get(n, (*unknown, n)), reverse=True):
            if excess <= 0:
                return
            logger.info("--keep-gb %g: deleting the weights of trial %d", self._keep_gb, number)
            excess -= self._delete(self._study.paths.trial_models(number), sizes)
        if excess > 0 and not self._warned:
            self._warned = True
            text = "--keep-gb %g: the checkpoints of the running trials alone take %.2f GB more; they are kept"
            logger.warning(text, self._keep_gb, excess / 1e9)

    @staticmethod
    def _delete(files: Iterable[Path], sizes: Mapping[Path, int]) -> int:
        """Delete files, which the artifact store, if any, keeps: it is not this disk. Return their size."""
        deleted = 0
        for path in files:
            path.unlink(missing_ok=True)
            deleted += sizes.get(path, 0)
        return deleted


def _size(path: Path) -> int:
    """File size in bytes; 0 if another worker has just deleted it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _orders(study: Study) -> dict[int, Order]:
    """Complete trial -> its sort key."""
    return {
        trial.number: best_first(trial, study.sign)
        for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    }


def _best_of(orders: Mapping[int, Order], keep: int) -> list[int]:
    return sorted(orders, key=orders.__getitem__)[:keep]


def _delete(study: Study, numbers: Iterable[int], *, folds: int) -> None:
    for number in numbers:
        for fold in range(1, folds + 1):
            weights = study.paths.trial_model(number, fold)
            weights.unlink(missing_ok=True)
            study.files.unshare(weights)
            study.paths.trial_validation(number, fold).unlink(missing_ok=True)


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Raise StudyError with how to resume: no configuration is at fault."""
    try:
        yield
    except Exception as error:
        if isinstance(error, HpoError) or not _is_full_disk(error):
            raise
        name = getattr(error, "filename", None) or folder
        raise StudyError(
            f"{name}: no space is left on the disk; free some, and run the same command again: finished trials are "
            "safe, and each running trial resumes from its last checkpoint"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    # safetensors has an error class of its own, with the system's message in it.
    return any(os.strerror(number) in str(error) for number in FULL_DISK)
