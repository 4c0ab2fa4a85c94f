"""Results of the commands as lines and tables."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from core.text import count
from hpo.analysis.kinds import best_of_kinds
from hpo.analysis.study_data import value_of
from hpo.analysis.summary import summarize
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.report.words import (
    command,
    joining,
    kinds_text,
    margins,
    next_commands,
    progress_text,
    states_text,
    storage_option,
    unproven,
)
from hpo.storage import mask
from hpo.study.front import front_table
from hpo.text import METRIC_WORDS, PARTLY_LUCK, assignments, duration, held_by, in_words, short_names

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from core.metrics import Scores
    from hpo.api.confirm import ConfirmResult
    from hpo.api.refit import RefitResult
    from hpo.api.search_result import SearchResult
    from hpo.api.study import Diagnosis
    from hpo.api.train import TrainResult
    from hpo.reporter import Reporter
    from hpo.search.training import Recorded
    from hpo.study import Study
    from hpo.submission.candidates import Candidate
    from hpo.submission.refit import Refitted

METRICS = {**METRIC_WORDS, "nll": "loss"}
"""Names of the metrics in tables."""

SHOWN_TRIALS = 5
IMBALANCE = 1.5  # accuracy hides single classes if the largest has this many times the images of the smallest
SHOWN_CLASSES = 30  # in the table by class; `result.json` and `metrics.json` have every row


# Studies ------------------------------------------------------------------------------------------------------------


def show_search(result: SearchResult, reporter: Reporter) -> None:
    """Show a study after a search, or how workers join it."""
    study, say = result.study, reporter.say
    if result.queued:
        say(f"{count(result.queued, 'trial')} waiting for workers; start them, on this machine or others, with")
        say(f"  {joining(study)}")
        return
    say()
    show_study(study, reporter)
    for number, host, since in result.held:
        say(f"{held_by(f'trial {number}', host, since)}; if that is dead:")
        say(f"  {study.settings.command} --reclaim")


def show_study(study: Study, reporter: Reporter) -> None:
    """Show a study's trials by state, its best trials, their gain over the baselines, and the next commands."""
    now, say = summarize(study), reporter.say
    what = f"space {study.space_name}" if study.confirms is None else f"confirms {study.confirms}"
    say(f"study {study.name} ({what}): {progress_text(study, now.counts.finished)}: {states_text(now.counts)}")
    say(f"  data {study.data_name}, objective {study.metric} on the validation images, seed {study.seed}")
    say(f"  storage {study.storage_shown}")
    if study.paths.overview.exists():
        say(f"  picture {study.paths.overview}")
    if now.best is not None:
        say()
        _show_best_trials(study, reporter)
        _show_front(study, reporter)
        say()
        for line in margins(now, study.metric, study.direction):
            say(line)
        for line in kinds_text(best_of_kinds(study, _current_confirmation(study)), study.metric):
            say(f"  {line}")
        _show_confirmation(study, reporter)
    if study.confirms is not None:
        say()
        _show_candidates(study, reporter)
    say()
    _show_next(next_commands(study, now), reporter)


def _current_confirmation(study: Study) -> Confirmation | None:
    found = read_confirmation(study.paths.confirmation)
    return found if found is not None and is_current(found, study.counts().finished) else None


def _show_best_trials(study: Study, reporter: Reporter) -> None:
    complete = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: (-study.sign * value_of(trial), trial.number))[:SHOWN_TRIALS]
    rows = [[trial.number, f"{value_of(trial):.4f}", assignments(trial.params)] for trial in ranked]
    reporter.table(["trial", study.metric, "parameters"], rows, right=(0, 1))


def _show_front(study: Study, reporter: Reporter) -> None:
    """Show the trials that no other beats in score and costs, if costs were measured."""
    if (found := front_table(study)) is not None:
        reporter.say()
        reporter.say(found.caption)
        reporter.table(found.columns, found.rows, right=range(len(found.columns)))


def _show_confirmation(study: Study, reporter: Reporter) -> None:
    confirmation = read_confirmation(study.paths.confirmation)
    if confirmation is None:
        reporter.say(f"not confirmed yet: {PARTLY_LUCK}")
        return
    since = study.counts().finished - confirmation.search_trials
    ago = f", {count(since, 'trial')} ago" if since else ""
    first, *others = confirmation.headline()
    for line in (f"confirmed{ago}: {first}", *(f"  {other}" for other in others)):
        reporter.say(line)


def _show_candidates(study: Study, reporter: Reporter) -> None:
    from hpo.confirmation.trials import trainings  # with torch

    found = trainings(study)
    rows = []
    for key in dict.fromkeys(training.key for training in found):
        own = [training for training in found if training.key == key]
        scores = [statistics.fmean(training.values) for training in own if training.values is not None]
        mean = f"{statistics.fmean(scores):.4f}" if scores else ""
        why = next((words for training in own if (words := training.failure or training.stopped)), "")
        rows.append([key, len(scores), mean, why])
    reporter.table(["candidate", "n", f"mean {study.metric}", "stopped"], rows, right=(1, 2))


def trial_rows(frame: pandas.DataFrame) -> list[list[Any]]:
    """Return the main columns of a study's trials, a row each."""
    names = short_names(column.removeprefix("params.") for column in frame.columns if column.startswith("params."))
    return [_trial_row(row, names) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]


def _trial_row(row: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
    value, elapsed_s = row["value"], row["elapsed_s"]
    params = {short: row[f"params.{path}"] for path, short in names.items()}
    drawn = assignments({name: value for name, value in params.items() if value is not None})
    origin = ["the baseline"] if row["baseline"] else []
    origin += [f"recipe {row['recipe']}"] if row["recipe"] else []
    origin += [f"as {row['warm_start']}"] if row["warm_start"] else []
    return [
        row["number"],
        row["failure"] or row["state"],
        "" if value is None else f"{value:.4f}",
        "" if row["epochs"] is None else row["epochs"],
        "" if elapsed_s is None else duration(elapsed_s),
        f"({', '.join(origin)}) {drawn}" if origin else drawn,
    ]


def show_confirmation(result: ConfirmResult, reporter: Reporter) -> None:
    """Show the result of a confirmation."""
    for line in ("", *result.confirmation.lines(), ""):
        reporter.say(line)
    study = result.study
    commands = [command(study, "refit best --study"), command(study, "report"), *unproven(study, result.confirmation)]
    _show_next(commands, reporter)


def _show_next(commands: Sequence[str], reporter: Reporter) -> None:
    reporter.say("next:")
    for line in commands:
        reporter.say(f"  {line}")


# Trainings ----------------------------------------------------------------------------------------------------------


def show_training(result: TrainResult, reporter: Reporter) -> None:
    """Show the scores of one training."""
    plan, recorded, say = result.plan, result.recorded, reporter.say
    say(f"{plan.name}: validation {_scores(recorded, plan.metric)} ({_course(recorded, plan.config.epochs)})")
    show_classes(recorded.per_class, result.labels, f"{result.validation_images:,} validation images", reporter)
    if plan.published:
        say(f"  result reported by its author: {plan.published}")
    if result.comparison is not None:
        say(result.comparison)
    say(f"written to {shlex.quote(str(result.folder))}")


def _scores(recorded: Recorded, metric: str) -> str:
    """All metrics, the chosen one first; with folds, mean and standard deviation."""
    from core import metrics
    from hpo.search.training import spread

    counted = [result.kept.counted(metric) for result in recorded.results]
    words = []
    for name in (metric, *(other for other in metrics.METRICS if other != metric)):
        values = [metrics.value(scores, name) for scores in counted]
        deviation = spread(values)
        around = "" if deviation is None else f" ± {deviation:.4f}"
        words.append(f"{METRICS[name]} {statistics.fmean(values):.4f}{around}")
    return ", ".join(words)


def _course(recorded: Recorded, epochs: int) -> str:
    kept = [result.kept for result in recorded.results]
    which = ", ".join(str(epoch.epoch) for epoch in kept)
    took = duration(sum(result.history[-1].elapsed_s for result in recorded.results))
    of = f"epoch {which} of {epochs}" if len(kept) == 1 else f"{len(kept)} folds, epochs {which} of {epochs}"
    return f"{of}, {took}, {statistics.fmean(epoch.images_per_s for epoch in kept):,.0f} images/s"


def show_classes(rows: Sequence[Mapping[str, Any]], labels: Tensor, images: str, reporter: Reporter) -> None:
    """Show a table by class, if the data set is imbalanced and has few enough classes to read.

    Args:
        rows: Of `core.metrics.per_class`.
        labels: (N,) int64, of the images outside the test set.
        images: Names the images that were counted.
    """
    if not is_imbalanced(labels) or len(rows) > SHOWN_CLASSES:
        return
    reporter.say(f"class by class, {images}:")
    reporter.table(
        ["class", "images", "precision", "recall", "F1"],
        [[row["class"], row["support"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))] for row in rows],
        right=(1, 2, 3, 4),
    )


def is_imbalanced(labels: Tensor) -> bool:
    """Whether the largest class has at least `IMBALANCE` times the images of the smallest."""
    counts = labels.bincount()
    return bool(counts.max() >= IMBALANCE * counts.min())


# Models -------------------------------------------------------------------------------------------------------------


def show_refit(result: RefitResult, reporter: Reporter, *, ending: bool = True) -> None:
    """Show the decisions, the test scores, and, as the `ending`, how to use the model."""
    done, study, say = result.refitted, result.study, reporter.say
    _show_decisions(done, result.metric, reporter)
    scores = ["accuracy", "macro_f1", "loss"]
    if result.metric == "balanced_accuracy":
        scores.insert(1, result.metric)
    plain = done.decision.views == "none" and done.decision.temperature.value == 1
    chosen = [done.decision.views, f"{done.decision.temperature.value:.3g}"]
    reporter.table(
        ["images", "views", "temperature", *(METRICS.get(score, score) for score in scores)],
        [
            [done.source, *chosen, *_values(done.val, scores)],
            *([] if plain else [["test", "none", "1", *_values(done.test_plain, scores)]]),
            ["test", *chosen, *_values(done.test, scores)],
            ["  95 % interval", "", "", *("{:.4f}–{:.4f}".format(*done.intervals[score]) for score in scores)],
        ],
        right=range(2, 3 + len(scores)),
    )
    show_classes(done.test_per_class, result.labels, f"{result.test_images:,} test images", reporter)
    times = "once" if done.openings == 1 else f"{done.openings} times"
    whose = "by this study" if study is not None else "by refits of recipes"
    say(f"the test set has now been opened {times} {whose}")
    if done.onnx_difference is not None:
        say(f"ONNX: its probabilities differ from torch's by at most {done.onnx_difference:.1e}")
    if not ending:
        return
    say(f"written to {done.dir}, with a model card in its README.md")
    say()
    commands = [f"hpo predict {shlex.quote(str(done.dir))} IMAGES -o submission.csv"]
    if study is not None:
        commands.append(command(study, "report"))
        commands += [] if result.confirmation is None else unproven(study, result.confirmation)
    _show_next(commands, reporter)


def _show_decisions(done: Refitted, metric: str, reporter: Reporter) -> None:
    decision, name, say = done.decision, METRICS[metric], reporter.say
    images = f"{decision.images:,} {done.source} images"
    say(f"chosen on {images}, by networks that have not seen them ({count(decision.networks, 'training')}):")
    reporter.table(
        ["", "candidate", name, "gain", "passes", ""],
        [
            [
                each.step if first else "",
                each.name,
                f"{each.score:.4f}",
                "" if each.gain is None else f"{each.gain.value:+.4f} ± {each.gain.error:.4f}",
                each.passes,
                each.verdict,
            ]
            for each, first in _first_of_steps(decision.candidates)
        ],
        right=(2, 3, 4),
    )
    if decision.selection:
        say("  the ensemble: " + ", ".join(f"{each.weight:.0%} {each.name}" for each in decision.selection))
    temperature = decision.temperature
    before, after = temperature.before.loss, temperature.after.loss
    changed = "" if temperature.value == 1 else f"; loss {before:.4f} before, {after:.4f} after"
    why = "" if temperature.why is None else f" ({temperature.why})"
    say(f"  temperature: {temperature.value:.3g}{why}{changed}")


def _first_of_steps(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, bool]]:
    """Each candidate, and whether its step begins with it."""
    before = None
    for each in candidates:
        yield each, each.step != before
        before = each.step


def _values(scores: Scores, names: Sequence[str]) -> list[str]:
    return [f"{getattr(scores, name):.4f}" for name in names]


# Doctor -------------------------------------------------------------------------------------------------------------


def show_diagnosis(diagnosis: Diagnosis, reporter: Reporter) -> None:
    """Show the problems of a study, those that were fixed, and the disk space it uses."""
    from hpo.analysis.doctor.check import Note

    say, findings, name = reporter.say, diagnosis.findings, diagnosis.check.name
    for finding, error in diagnosis.failed:
        say(f"could not be fixed: {finding.problem}: {error}")
    for finding in diagnosis.fixed:
        say(f"fixed: {finding.problem}")
    for each in diagnosis.results:
        say(f"note: {each.text}" if isinstance(each, Note) else f"{each.problem}; {each.advice}")
    say(f"study {name}: {count(len(findings), 'problem')} found" if findings else f"no problem found in study {name}")
    if fixable := sum(finding.fix is not None for finding in findings):
        fix = shlex.join(["hpo", "study", "doctor", name, *storage_option(mask(diagnosis.check.url)), "--mend"])
        say(f"  {fixable} can be fixed: {fix}")
    if diagnosis.disk:
        used = sorted(diagnosis.disk.items(), key=lambda kind: -kind[1])
        kinds = ", ".join(f"{kind} {in_words(size)}" for kind, size in used)
        say(f"on the disk: {in_words(sum(diagnosis.disk.values()))}: {kinds}")
