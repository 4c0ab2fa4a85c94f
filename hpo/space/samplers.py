"""Optuna's samplers with proposals that depend only on the study's seed and the trial index.

Optuna's random generators advance with every draw, so an interrupted study would continue differently. Here every
trial gets a new sampler.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpo.space import grammar
from hpo.space.own_parts import own_sampler
from hpo.storage.optuna_access import get_trials_cached, set_qmc_point, set_search_space, trial_id
from hpo.trials import PAUSED, trial_index_of


def sampler_seed(*parts: int | str) -> int:
    """Derive a seed in [0, 2**32), the range of NumPy's RandomState."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def build_sampler(config: grammar.Sampler, *, seed: int) -> TrialIndexSampler:
    """Build the sampler of a search space for a study's seed."""
    common = _CommonSpace(include_pruned=isinstance(config, grammar.TpeSampler))

    def build(trial_index: int, trial_seed: int) -> BaseSampler:
        sampler: TPESampler | GPSampler | CmaEsSampler
        match config:
            case grammar.OwnSampler():
                return own_sampler(config, seed=trial_seed)
            case grammar.RandomSampler():
                return RandomSampler(seed=trial_seed)
            case grammar.QmcSampler():
                qmc = QMCSampler(
                    scramble=True,  # unscrambled, the first point is a corner of the space in every study
                    seed=sampler_seed(seed, "qmc"),
                    independent_sampler=RandomSampler(seed=trial_seed),
                    warn_independent_sampling=False,
                )
                set_qmc_point(qmc, trial_index)
                return qmc
            case grammar.TpeSampler(startup_trials=startup):
                sampler = TPESampler(seed=trial_seed, n_startup_trials=startup)
            case grammar.GpSampler(startup_trials=startup):
                sampler = GPSampler(seed=trial_seed, n_startup_trials=startup, warn_independent_sampling=False)
            case grammar.CmaEsSampler(startup_trials=startup):
                sampler = CmaEsSampler(seed=trial_seed, n_startup_trials=startup, warn_independent_sampling=False)
        set_search_space(sampler, common)
        return sampler

    return TrialIndexSampler(build, seed)


class TrialIndexSampler(BaseSampler):
    """Delegates each trial to a new sampler from `build(trial index, seed)`."""

    def __init__(self, build: Callable[[int, int], BaseSampler], seed: int) -> None:
        self._build = build
        self._seed = seed
        # Trial id -> sampler: samplers keep state between `infer_relative_search_space` and `sample_relative`.
        self._relative: dict[int, BaseSampler] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        sampler = self._relative[trial_id(trial)] = self._fresh(trial, "relative")
        return sampler.infer_relative_search_space(_by_trial_index(study), _renumbered(trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._relative.pop(trial_id(trial), None) or self._fresh(trial, "relative")
        return sampler.sample_relative(_by_trial_index(study), _renumbered(trial), search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Seeded by name, so that a value does not depend on the number of earlier draws.
        sampler = self._fresh(trial, param_name)
        return sampler.sample_independent(_by_trial_index(study), _renumbered(trial), param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Do nothing: none of the samplers learns here, and `cmaes` would warn about constraints."""

    def reseed_rng(self) -> None:
        """Do nothing: the seeds follow from the trial indices."""

    def _fresh(self, trial: FrozenTrial, purpose: str) -> BaseSampler:
        trial_index = trial_index_of(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of `qmc`
            return self._build(trial_index, sampler_seed(self._seed, trial_index, purpose))


class _CommonSpace(IntersectionSearchSpace):
    """The parameters common to all finished trials.

    Optuna's class would miss a trial that was retried late; a new instance per trial takes 20 ms at 1,000 trials.
    """

    def __init__(self, *, include_pruned: bool) -> None:
        super().__init__(include_pruned)
        self._states = {TrialState.COMPLETE} | ({TrialState.PRUNED} if include_pruned else set())
        self._seen: set[int] = set()
        self._common: dict[str, BaseDistribution] | None = None

    def calculate(self, study: Study, use_cache: bool = False) -> dict[str, BaseDistribution]:
        for trial in get_trials_cached(study, use_cache=use_cache):
            if trial.state not in self._states or trial_id(trial) in self._seen:
                continue
            self._seen.add(trial_id(trial))
            if self._common is None:
                self._common = dict(sorted(trial.distributions.items()))
            else:
                theirs = trial.distributions
                self._common = {name: own for name, own in self._common.items() if theirs.get(name) == own}
        return dict(self._common or {})


class _ByTrialIndex:
    """A study whose trials are numbered and sorted by trial index, and in which paused trials are pruned.

    Everything else is the study's own.
    """

    def __init__(self, study: Study) -> None:
        self._study = study

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [
            _renumbered(trial)
            for trial in map(_as_pruned, get_trials_cached(self._study, use_cache=use_cache))
            if trial.state not in (TrialState.FAIL, TrialState.WAITING) and (states is None or trial.state in states)
        ]
        trials.sort(key=lambda trial: trial.number)
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._get_trials()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    """A trial that has paused at a rung, pruned there; the same object of other trials."""
    if trial.state not in (TrialState.WAITING, TrialState.RUNNING) or PAUSED not in trial.user_attrs:
        return trial
    pruned = copy.copy(trial)
    pruned.state = TrialState.PRUNED
    return pruned


def _by_trial_index(study: Study) -> Study:
    return cast("Study", _ByTrialIndex(study))


def _renumbered(trial: FrozenTrial) -> FrozenTrial:
    """The trial with its trial index as its number; the same object unless it was retried."""
    trial_index = trial_index_of(trial)
    if trial_index == trial.number:
        return trial
    renumbered = copy.copy(trial)
    renumbered.number = trial_index
    return renumbered
