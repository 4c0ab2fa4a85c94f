"""A study's summary on the terminal: its best trials, its gain over the baselines, and the next commands."""

from __future__ import annotations

import statistics

from optuna.trial import TrialState

from hpo.analysis.study_data import value_of
from hpo.analysis.summary import summarize
from hpo.cli.console import say, table
from hpo.confirmation.result import read_confirmation
from hpo.confirmation.trials import trainings
from hpo.dashboard.pictures import study_overview
from hpo.report.words import entry_name, margins, next_commands, progress_text, states_text
from hpo.study import Study
from hpo.text import assignments, count


def print_summary(study: Study) -> None:
    """The whole standing: trials by state, the best of them, what they beat, and the next commands."""
    now = summarize(study)
    what = f"space {study.space_name}" if study.confirms is None else f"confirms {study.confirms}"
    say(f"study {study.name} ({what}): {progress_text(study, now.counts.finished)}: {states_text(now.counts)}")
    say(f"  data {study.data_name}, objective {study.metric} on the validation images, seed {study.seed}")
    say(f"  storage {study.storage_shown}")
    if study.paths.overview.exists():
        say(f"  picture {study.paths.overview}")
    if now.best is not None:
        say()
        _say_best_trials(study)
        say()
        for line in margins(now, study.metric, study.direction):
            say(line)
        _say_confirmation(study)
    if study.confirms is not None:
        say()
        _say_candidates(study)
    say()
    say("next:")
    for command in next_commands(study, now):
        say(f"  {command}")


def _say_confirmation(study: Study) -> None:
    """What the best were confirmed to be, or that they were not."""
    confirmation = read_confirmation(study.paths.confirmation)
    if confirmation is None:
        say("not confirmed yet: the best of many scores is partly luck")
        return
    since = study.counts().finished - confirmation.search_trials
    ago = f", {count(since, 'trial')} ago" if since else ""
    say(f"confirmed{ago}: {confirmation.contender(confirmation.winner).name} is the winner")
    say(f"  {confirmation.verdict}")


def _say_candidates(study: Study) -> None:
    """What a confirmation has trained of each of its candidates."""
    found = trainings(study)
    rows = []
    for key in dict.fromkeys(training.key for training in found):
        own = [training for training in found if training.key == key]
        scores = [statistics.fmean(training.values) for training in own if training.values is not None]
        mean = f"{statistics.fmean(scores):.4f}" if scores else ""
        why = next((words for training in own if (words := training.failure or training.stopped)), "")
        rows.append([key, len(scores), mean, why])
    table(["candidate", "n", f"mean {study.metric}", "stopped"], rows, right=(1, 2))


def _say_best_trials(study: Study) -> None:
    complete = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: (-study.sign * value_of(trial), trial.number))[:SHOWN]
    table(
        ["trial", study.metric, "parameters"],
        [[trial.number, f"{value_of(trial):.4f}", assignments(trial.params)] for trial in ranked],
        right=(0, 1),
    )


def draw_overview(study: Study) -> None:
    """Draws the study's history into its folder."""
    now = summarize(study)
    baselines = {entry_name(entry): entry.value for entry in now.baselines if entry.value is not None}
    study_overview(study.optuna, study.paths.overview, metric=study.metric, baselines=baselines, title=study.name)


SHOWN = 5
