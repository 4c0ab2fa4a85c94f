"""The result of a confirmation, computed from its trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from hpo.confirmation import statistics
from hpo.confirmation.plan import Plan
from hpo.confirmation.result import BASELINE, Candidate, Confirmation, Contender, searched_best
from hpo.confirmation.statistics import Comparison
from hpo.confirmation.trials import Race, per_repeat, race, scores_of, trainings
from hpo.errors import StudyError
from hpo.paths import confirmation_of
from hpo.space import ConfirmationSpace
from hpo.study import Study
from hpo.study.versions import versions


def conclude(plan: Plan, study: Study | None, *, out_of_time: bool = False) -> Confirmation:
    """Compare the trained candidates with the baseline; `study` is None if there was nothing to train.

    Args:
        out_of_time: Whether a time limit left planned trainings out.

    Raises:
        StudyError: Nothing could be trained.
    """
    search = plan.search
    known = [] if study is None else trainings(study)
    space, state = None if study is None else study.space(), Race((), {})
    if isinstance(space, ConfirmationSpace):
        state = race(known, space)
    contenders = [_contender(candidate, state) for candidate in (*plan.chosen, *plan.earlier(known))]
    if isinstance(space, ConfirmationSpace):
        compared = _compared(search.name, contenders, space, plan.margin, per_repeat(known))
    else:
        compared = Comparison(None, BASELINE, {}, None, None, evidence=False)
    contenders = [replace(one, interval=compared.scores.get(one.key)) for one in contenders]
    contenders.sort(key=lambda one: math.inf if one.interval is None else -search.sign * one.interval.mean)
    return Confirmation(
        study=search.name,
        metric=search.metric,
        direction=search.direction,
        contenders=tuple(contenders),
        leader=compared.leader,
        winner=compared.winner,
        evidence=compared.evidence,
        advantage=compared.advantage,
        expected=compared.expected,
        margin=plan.margin,
        optimism=_optimism(contenders, maximize=search.direction == "maximize"),
        search_epochs=plan.search_epochs,
        budget_epochs=plan.budget_epochs,
        epochs=sum(training.epochs for training in known),
        trainings=sum(training.values is not None for training in known),
        replicates=max((len(one.scores) for one in contenders), default=0),
        elapsed_s=sum(training.elapsed_s for training in known),
        left_out=plan.left_out,
        search_trials=plan.search_trials,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        out_of_time=out_of_time,
        test_share=space.test_share if isinstance(space, ConfirmationSpace) else None,
        per_repeat=per_repeat(known),
        resolution=space.resolution if isinstance(space, ConfirmationSpace) else 0.0,
        on_given_val=search.metadata["data"].get("given_val") is not None,
    )


def _contender(candidate: Candidate, state: Race) -> Contender:
    own = [training for training in state.counted if training.identity == candidate.identity]
    failures = [training.failure for training in own if training.failure]
    return Contender(
        **vars(candidate),
        scores=scores_of(own).get(candidate.identity, {}),
        stopped=None if failures else state.left.get(candidate.identity),
        failure=failures[0] if failures else None,
        interval=None,
    )


def _compared(
    search: str, contenders: Sequence[Contender], space: ConfirmationSpace, margin: float, repeat: int
) -> Comparison:
    try:
        return statistics.compare(
            {one.key: one.scores for one in contenders},
            baseline=BASELINE,
            stopped=[one.key for one in contenders if one.stopped is not None],
            test_share=space.test_share,
            per_repeat=repeat,
            maximize=space.direction == "maximize",
            resolution=space.resolution,
            margin=margin,
        )
    except ValueError as error:
        failures = ", ".join(f"{one.key}: {one.failure or 'not trained yet'}" for one in contenders)
        raise StudyError(
            f"study {search}: nothing could be trained again ({failures}); inspect it with "
            f"hpo study show {confirmation_of(search)}"
        ) from error


def _optimism(contenders: Sequence[Contender], *, maximize: bool) -> float | None:
    """How much the best score of the search is too optimistic; None if its trial has no confirmed score."""
    best = searched_best(contenders, maximize=maximize)
    if best is None or best.search_value is None or best.interval is None:
        return None
    return statistics.optimism(best.search_value, best.interval, maximize=maximize)
