"""Optuna's samplers, made to propose the same values for a slot whatever happened around it.

A sampler's generator advances with every draw, so a study that was stopped and resumed, or whose worker was killed,
would go on differently from its undisturbed twin. Here every slot gets a fresh sampler, seeded from the study's seed
and the slot (for values drawn one by one, from the parameter's name too), and the sampler sees the study by slots: each
once, under the slot's number, in the slots' order, without the attempts that were cut off.
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
from hpo.storage.optuna_access import get_trials_cached, set_qmc_point, set_search_space, trial_id
from hpo.trials import trial_index_of


def sampler_seed(*parts: int | str) -> int:
    """A seed in [0, 2**32), all that NumPy's RandomState takes, that depends on all parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def build_sampler(config: grammar.Sampler, *, seed: int) -> TrialIndexSampler:
    """The sampler that a search space asks for.

    Args:
        seed: the study's.
    """

    common = _CommonSpace(include_pruned=isinstance(config, grammar.TpeSampler))

    def build(trial_index: int, seed_of_trial_index: int) -> BaseSampler:
        match config:
            case grammar.TpeSampler():
                tpe = TPESampler(seed=seed_of_trial_index, n_startup_trials=config.startup_trials)
                set_search_space(tpe, common)
                return tpe
            case grammar.GpSampler():
                startup = config.startup_trials
                gp = GPSampler(seed=seed_of_trial_index, n_startup_trials=startup, warn_independent_sampling=False)
                set_search_space(gp, common)
                return gp
            case grammar.CmaEsSampler():
                startup = config.startup_trials
                cma = CmaEsSampler(seed=seed_of_trial_index, n_startup_trials=startup, warn_independent_sampling=False)
                set_search_space(cma, common)
                return cma
            case grammar.QmcSampler():
                qmc = QMCSampler(
                    scramble=True,  # unscrambled, the first point is a corner of the space in every study
                    seed=sampler_seed(seed, "qmc"),
                    independent_sampler=RandomSampler(seed=seed_of_trial_index),
                    warn_independent_sampling=False,
                )
                set_qmc_point(qmc, trial_index)
                return qmc
            case grammar.RandomSampler():
                return RandomSampler(seed=seed_of_trial_index)

    return TrialIndexSampler(build, seed)


class TrialIndexSampler(BaseSampler):
    """Asks a fresh sampler for every trial.

    Args:
        build: (slot, seed) -> an Optuna sampler.
        seed: the study's.
    """

    def __init__(self, build: Callable[[int, int], BaseSampler], seed: int) -> None:
        self._build = build
        self._seed = seed
        # Between `infer_relative_search_space` and `sample_relative` of one trial, since samplers keep state there.
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
        # By name, so that a value does not depend on how many were drawn before it.
        sampler = self._fresh(trial, param_name)
        return sampler.sample_independent(_by_trial_index(study), _renumbered(trial), param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: none of the samplers learns here, and `cmaes` would warn of every constraint."""

    def reseed_rng(self) -> None:
        """Nothing: the seeds follow from the slots."""

    def _fresh(self, trial: FrozenTrial, purpose: str) -> BaseSampler:
        trial_index = trial_index_of(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # `qmc` is one, by Optuna's label
            return self._build(trial_index, sampler_seed(self._seed, trial_index, purpose))


class _CommonSpace(IntersectionSearchSpace):
    """The parameters that all finished trials share, as Optuna's own, but in any order of trials.

    Optuna's remembers how far it has come by the trials' numbers, so it would miss a slot that was retried late; and a
    fresh one compares every distribution of every trial again, 20 ms at 1,000 trials.
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


class _BySlot:
    """A study seen by its slots. Everything but the trials is the study's own."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [
            _renumbered(trial)
            for trial in self._study._get_trials(deepcopy=False, states=states, use_cache=use_cache)
            if trial.state not in (TrialState.FAIL, TrialState.WAITING)
        ]
        trials.sort(key=lambda trial: trial.number)
        return copy.deepcopy(trials) if deepcopy else trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def _by_trial_index(study: Study) -> Study:
    return cast("Study", _BySlot(study))


def _renumbered(trial: FrozenTrial) -> FrozenTrial:
    """The trial under its slot's number: itself, unless it was retried."""
    trial_index = trial_index_of(trial)
    if trial_index == trial.number:
        return trial
    renumbered = copy.copy(trial)
    renumbered.number = trial_index
    return renumbered
