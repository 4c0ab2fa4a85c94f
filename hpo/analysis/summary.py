"""How a study stands, in words: its best trials, by how much they beat the base and each recipe, and how to go on.

A confirmation is shown by its candidates: the best of its trials is the luckiest replicate, and says nothing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.confirmation.statistics import MAX_REPLICATES
from hpo.dashboard.serve import command as dashboard_command
from hpo.storage import is_masked
from hpo.study import Counts, Study
from hpo.study.results import read_result
from hpo.text import count, gap
from hpo.trials import RECIPE, is_baseline

# Trials in the table of the best: what fits a screen beside what was said before.


@dataclass(frozen=True)
class StudySummary:
    """How a study stands."""

    counts: Counts
    best: FrozenTrial | None
    rivals: tuple[tuple[str, float | None], ...]
    """(what it is, its value): the base and the recipes, for the best trial to beat; None could not be trained."""

    @property
    def best_value(self) -> float | None:
        return None if self.best is None else self.best.value

    @property
    def states(self) -> str:
        """The trials by state, in words."""
        counts = self.counts
        words = [
            f"{number} {state}"
            for state, number in (
                ("complete", counts.complete),
                ("pruned", counts.pruned),
                ("failed to train", counts.failures),
                ("running", counts.running),
                ("waiting", counts.waiting),
            )
            if number
        ]
        return ", ".join(words) or "none yet"


def summarize(study: Study) -> StudySummary:
    """How a study stands now."""
    over = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rivals: list[tuple[str, float | None]] = []
    for trial in over:
        value = trial.value if trial.state == TrialState.COMPLETE else None
        if is_baseline(trial):
            rivals.append((f"the base (trial {trial.number})", value))
        if RECIPE in trial.user_attrs:
            rivals.append((f"recipe {trial.user_attrs[RECIPE]} (trial {trial.number})", value))
    for reference in study.paths.references():
        result = read_result(reference)
        if result is not None:
            rivals.append((f"recipe {reference.dir.name}", result.get("value")))
    best = study.best_trial() if study.confirms is None else None
    return StudySummary(study.counts(), best, tuple(rivals))


def how_far(study: Study, finished: int) -> str:
    """How far a study has come: "12 of 20 trials finished"; a total that was made smaller since is not shown."""
    if study.total is None:
        return f"{count(finished, 'trial')} finished"
    return f"{finished} of {count(max(study.total, finished), 'trial')} finished"


def margins(now: StudySummary, metric: str, direction: str) -> list[str]:
    """By how much the best trial's validation value beats each rival's, a line each."""
    if now.best is None or now.best.value is None:
        return []
    lines = [f"best: trial {now.best.number}, validation {metric} {now.best.value:.4f}"]
    sign = 1 if direction == "maximize" else -1
    for name, value in now.rivals:
        if value is None:
            lines.append(f"  {name} could not be trained")
            continue
        gain = sign * (now.best.value - value)
        size = gap(metric, abs(gain))
        if name.endswith(f"(trial {now.best.number})"):
            lines.append(f"  it is {name}: the search found nothing better")
        elif gain == 0:
            lines.append(f"  no better than {name}, {value:.4f}")
        else:
            lines.append(f"  {size} {'better' if gain > 0 else 'worse'} than {name}, {value:.4f}")
    return lines


def next_commands(study: Study, now: StudySummary) -> Sequence[str]:
    """What a person may want to type next, ready to copy."""
    name, storage = shlex.quote(study.name), _storage_option(study)
    commands = []
    if study.total is not None and now.counts.finished < study.total:
        commands.append(run_again(study))
    elif study.confirms is not None:
        commands.append(f"hpo confirm {shlex.quote(study.confirms)}{storage}")
    if now.best is not None:
        confirmation = read_confirmation(study.paths.confirmation)
        if confirmation is None or not is_current(confirmation, now.counts.finished):
            commands.append(f"hpo confirm {name}{storage}")
        commands.append(f"hpo refit best --study {name}{storage}")
        commands.append(f"hpo report {name}{storage}")
        if confirmation is not None and is_current(confirmation, now.counts.finished):
            commands += unproven(study, confirmation)
    commands.append(f"hpo dashboard {name}{storage}")
    if study.artifact_dir is not None:
        commands.append(shlex.join(dashboard_command(study.storage_url, study.artifact_dir)))
    return commands


def unproven(study: Study, confirmation: Confirmation) -> list[str]:
    """What there is to do where there is no evidence: refit the leader all the same, or look closer; else nothing."""
    if confirmation.leader in (None, confirmation.winner):
        return []
    name, storage, leader = shlex.quote(study.name), _storage_option(study), confirmation.contender(confirmation.leader)
    commands = []
    if confirmation.search_epochs and confirmation.replicates < MAX_REPLICATES:
        spent = max(confirmation.budget_epochs, confirmation.epochs)
        share = math.ceil(20 * spent / confirmation.search_epochs) / 10
        commands.append(f"hpo confirm {name} --budget {share:g}{storage}  # twice the trainings, to be surer")
    if leader.trial is not None:
        commands.append(f"hpo refit {leader.trial} --study {name}{storage}  # {leader.name} all the same")
    return commands


def _storage_option(study: Study) -> str:
    """A password is never written down, so whoever goes on has to give it again."""
    return f" --storage {shlex.quote(study.storage_shown)}" if is_masked(study.storage_shown) else ""


def run_again(study: Study) -> str:
    """The command that goes on with the study, ready to copy."""
    return study.command or shlex.join(["hpo", "run", study.space_name, "--study", study.name])


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value
