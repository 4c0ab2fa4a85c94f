"""Sentences and names that several views of a study share: terminal, report and comparison."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from core.text import count
from hpo import text
from hpo.analysis.baselines import Entry
from hpo.analysis.kinds import Best
from hpo.analysis.labels import LabelAudit
from hpo.analysis.summary import StudySummary
from hpo.confirmation.result import BASELINE, Confirmation, is_current, read_confirmation
from hpo.confirmation.statistics import MAX_REPLICATES
from hpo.space.pruner import spared
from hpo.storage import is_masked
from hpo.study import Study
from hpo.study.patience import AHEAD
from hpo.text import counted, gap, score
from hpo.trials import FAILURE, Counts

if TYPE_CHECKING:
    from hpo.analysis.study_data import StudyData


def metric_label(metric: str) -> str:
    """The name of a metric on an axis, with its unit if it has one."""
    name = text.METRIC_WORDS.get(metric, metric)
    return f"{name} (nats)" if metric == "nll" else name


def trial_name(trial: FrozenTrial) -> str:
    """`trial 12`, with its role in parentheses."""
    role = spared(trial)
    return f"trial {trial.number} ({role})" if role else f"trial {trial.number}"


def describe(data: StudyData, trial: FrozenTrial) -> str:
    """A trial's name, result and epochs, in three lines of HTML for the label at the pointer."""
    label = metric_label(data.metric)
    last = None if trial.last_step is None else trial.intermediate_values.get(trial.last_step)
    if trial in data.complete:
        result = f"{label} {score(trial.value)}"
    elif trial in data.failed:
        result = f"failed: {trial.user_attrs[FAILURE]}"
    else:
        state = "pruned" if trial in data.pruned else "paused" if trial in data.paused else "running"
        result = state if last is None else f"{state} at {label} {score(last)}"
    return f"{trial_name(trial)}<br>{result}<br>{count(data.epochs(trial), 'epoch')}"


def entry_name(entry: Entry) -> str:
    """`the baseline`, `trial 12` or `recipe NAME`."""
    return "the baseline" if entry.is_baseline else entry.key


def patience_text(study: Study) -> str:
    """Why a study with patience has ended."""
    now = study.patience.outlook()
    assert now is not None, "the study has ended"
    best = f"{text.METRIC_WORDS.get(study.metric, study.metric)} {score(now.best)}"
    return (
        f"a better trial is unlikely: after {count(now.trials, 'trial')}, the chance that one of {AHEAD} more beats "
        f"the best ({best}) by more than its standard error ({now.error:.4f}) is {100 * now.chance:.0f} %"
    )


def states_text(counts: Counts) -> str:
    """The number of trials in each state: `12 complete, 3 pruned`."""
    numbers = {
        "complete": counts.complete,
        "pruned": counts.pruned,
        "failed to train": counts.failures,
        "running": counts.running - counts.dead,
        "left by a dead process": counts.dead,
        "paused": counts.paused,
        "waiting": counts.waiting,
    }
    return counted(numbers) or "none yet"


def progress_text(study: Study, finished: int) -> str:
    """`12 of 20 trials finished`; a total that was reduced below the finished trials is not shown."""
    if study.total is None:
        return f"{count(finished, 'trial')} finished"
    return f"{finished} of {count(max(study.total, finished), 'trial')} finished"


def margins(summary: StudySummary, metric: str, direction: str) -> list[str]:
    """Lines with the best trial's value and by how much it beats each baseline."""
    if summary.best is None or summary.best.value is None:
        return []
    best, lines = summary.best, [f"best: trial {summary.best.number}, validation {metric} {summary.best.value:.4f}"]
    for entry in summary.baselines:
        name = entry_name(entry) + ("" if entry.trial is None else f" (trial {entry.trial})")
        if entry.value is None:
            lines.append(f"  {name} could not be trained")
            continue
        gain = (summary.best.value - entry.value) * (1 if direction == "maximize" else -1)
        if entry.trial == best.number:
            why = "nothing else was trained" if summary.counts.finished == 1 else "the search found nothing better"
            lines.append(f"  it is {name}: {why}")
        elif gain == 0:
            lines.append(f"  no better than {name}, {entry.value:.4f}")
        else:
            better = "better" if gain > 0 else "worse"
            lines.append(f"  {gap(metric, abs(gain))} {better} than {name}, {entry.value:.4f}")
    return lines


def outdated(study: Study, confirmation: Confirmation, finished: int) -> str:
    """The sentence about a confirmation that is older than the study's last trials."""
    return (
        f"The confirmation was made when {count(confirmation.search_trials, 'trial')} were finished, and now "
        f"{finished} are; `{command(study, 'confirm')}` repeats it."
    )


def kinds_text(kinds: Sequence[Best], metric: str) -> list[str]:
    """Describe which kind of training is best and by how much, a line per kind; empty for no kinds."""
    lines = []
    for best in kinds:
        network = "" if best.key.startswith("recipe ") else f" of {best.network}"
        name = "the baseline" if best.key == BASELINE else best.key
        what = f"{best.kind}: {metric_label(metric)} {score(best.value)} ({name}{network})"
        if best.behind is not None:
            what += f", {gap(metric, abs(best.behind.mean), best.behind.half_width)} "
            what += "worse" if best.behind.mean >= 0 else "better on the same splits"
        lines.append(what)
    return lines


# Commands to continue with ------------------------------------------------------------------------------------------


def storage_option(url: str) -> list[str]:
    """`--storage URL` if the URL's password is masked and has to be given again."""
    return ["--storage", url] if is_masked(url) else []


def command(study: Study, words: str, *options: str, name: str | None = None) -> str:
    """`hpo WORDS STUDY OPTIONS`, with another study's `name` if given."""
    return shlex.join(["hpo", *words.split(), name or study.name, *options, *storage_option(study.storage_shown)])


def run_again(study: Study) -> str:
    """The command that resumes the study."""
    return study.settings.command or shlex.join(["hpo", "run", study.space_name, "--study", study.name])


def queues_only(study: Study) -> bool:
    """Whether the study's last command left its trials to workers."""
    words = shlex.split(study.settings.command or "")
    return "--workers 0" in " ".join(words)


def joining(study: Study) -> str:
    """The command of a worker that joins the study, with its password masked."""
    own = study.storage_url == str(study.paths.journal)
    return shlex.join(["hpo", "worker", study.name, *([] if own else ["--storage", study.storage_shown])])


def resuming(study: Study) -> str:
    """The command that trains the study's remaining trials."""
    return joining(study) if queues_only(study) else run_again(study)


def no_trials(study: Study) -> str:
    """The sentence about a study that has not been run."""
    return f"study {study.name} has no trials yet; run it with: {resuming(study)}"


def next_commands(study: Study, summary: StudySummary) -> list[str]:
    """The commands that may follow, ready to copy."""
    commands = []
    if study.total is not None and summary.counts.finished < study.total:
        commands.append(resuming(study))
    elif study.confirms is not None:
        commands.append(command(study, "confirm", name=study.confirms))
    if summary.best is not None:
        confirmation = read_confirmation(study.paths.confirmation)
        confirmed = confirmation is not None and is_current(confirmation, summary.counts.finished)
        commands += [] if confirmed else [command(study, "confirm")]
        commands += [command(study, "refit best --study"), command(study, "report")]
        commands += unproven(study, confirmation) if confirmation is not None and confirmed else []
    commands.append(command(study, "dashboard"))
    if study.files.dashboard_folder is not None:
        from hpo.dashboard.serve import command as dashboard_command  # with an HTTP server

        commands.append(shlex.join(dashboard_command(study.storage_url, study.files.dashboard_folder)))
    return commands


def unproven(study: Study, confirmation: Confirmation) -> list[str]:
    """The commands that may follow if no gain is proven: more replicates, or the refit of a leader that lost."""
    if confirmation.leader is None or confirmation.evidence:
        return []
    leader = confirmation.contender(confirmation.leader)
    commands = []
    if confirmation.search_epochs and confirmation.replicates < MAX_REPLICATES:
        spent = max(confirmation.budget_epochs, confirmation.epochs)
        budget = math.ceil(20 * spent / confirmation.search_epochs) / 10
        more = command(study, "confirm", "--budget", f"{budget:g}")
        commands.append(f"{more}  # twice the trainings, for more certainty")
    if leader.trial is not None and leader.key != confirmation.winner:
        commands.append(f"{command(study, f'refit {leader.trial} --study')}  # {leader.name} without proof")
    return commands


def audit_text(study: Study, audit: LabelAudit) -> list[str]:
    """Describe how many labels are contradicted, by how many networks, and the images that none has predicted."""
    found = len(audit.suspects)
    judges = f"the {count(audit.networks, 'network')} of study {study.name}"
    words = "label is" if found == 1 else "labels are"
    lines = [f"{found:,} of {count(audit.checked, 'image')}: the {words} contradicted by {judges}, not trained on them"]
    if missing := audit.images - audit.checked:
        advice = "" if study.paths.confirmation.exists() else f"; {command(study, 'confirm')} checks more"
        lines.append(f"{count(missing, 'image')} were in no validation set and are not checked{advice}")
    return lines
