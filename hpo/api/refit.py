"""`hpo refit`: the winner of a search, or a trial, becomes a submission model."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from core.config import TrainConfig
from core.data import Dataset
from core.metrics import Scores
from core.runtime import describe_device, select_device
from hpo.api.common import memory_told, open_dataset, say_patience
from hpo.api.confirm import confirmed
from hpo.cli.console import say, table
from hpo.cli.scores import METRIC_WORDS, say_per_class, training_bars
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.confirmation.words import NO_GAIN
from hpo.errors import StudyError
from hpo.paths import refit_label
from hpo.report.words import unproven
from hpo.search.interrupts import Interrupts
from hpo.storage import is_masked
from hpo.study import Study, find_study
from hpo.submission import Refitted, refit, search_summary
from hpo.submission.onnx_export import check_onnx

# Networks of an ensemble: what `data.folds` and a bundle allow.
FEWEST, MOST = 2, 20


@dataclass(frozen=True)
class _Chosen:
    """What is refitted."""

    what: str
    """In words: `trial 12`, `the base (trial 0)`, `recipe NAME`."""
    label: str
    """Of the bundle's folder, but for what tells an ensemble."""
    number: int | None
    """The trial's; None of a configuration that is none."""
    recipe: str | None
    config: TrainConfig
    epochs: int
    confirmation: Confirmation | None = None
    """What it was chosen by."""


def refit_command(
    trial: str,
    *,
    study_name: str | None,
    storage: str | None,
    data: Path | None,
    folds: int | None,
    members: int | None,
    onnx: bool,
    confirm: bool,
    device_name: str | None,
) -> Refitted:
    """Confirms what is called the best, retrains it, opens the test set, and says what came of it."""
    _check_several(folds, members)
    if onnx:
        check_onnx()
    study = find_study(study_name, storage_url=storage)
    device = select_device(device_name)
    with Interrupts(told=say_patience) as interrupts:
        chosen = _choose(study, trial, confirm=confirm, data=data, device_name=device_name, interrupts=interrupts)
        study.use_depot(None)
        if chosen.number is not None:
            study.bring_trial(chosen.number, folds=chosen.config.data.folds or 1)
        dataset = open_dataset(chosen.config.data, data or study.data_path, skip_broken=study.skip_broken)
        study.check_data(dataset)
        study.check_weights(chosen.config)
        say(f"refitting {chosen.what} of study {study.name}{_how(chosen, folds, members)}; {describe_device(device)}")
        one = folds is None and members is None
        shown_epochs = chosen.epochs if one else chosen.config.epochs
        bars = training_bars("refit", epochs=shown_epochs, metric=study.metric, interrupts=interrupts)
        try:
            with memory_told(), interrupts.patient(), bars as watch:
                done = refit(
                    study.paths,
                    number=chosen.number,
                    label=refit_label(chosen.label, folds, members),
                    config=chosen.config,
                    epochs=chosen.epochs,
                    dataset=dataset,
                    metric=study.metric,
                    device=device,
                    recipe=chosen.recipe,
                    ensemble=folds,
                    members=members,
                    onnx=onnx,
                    confirmation=chosen.confirmation,
                    search=search_summary(study),
                    watch=watch,
                )
        except KeyboardInterrupt:
            say("stopped; the same command goes on from the last checkpoint")
            raise
        in_folds = folds is not None or (members is None and chosen.config.data.folds is not None)
        _say_refitted(done, study, dataset, validation="out-of-fold" if in_folds else "validation")
        for command in () if chosen.confirmation is None else unproven(study, chosen.confirmation):
            say(f"  {command}")
    return done


def _check_several(folds: int | None, members: int | None) -> None:
    """Raises StudyError where the numbers of networks cannot be used."""
    if folds is not None and members is not None:
        raise StudyError("--folds and --members both make several networks, by fold or by seed; give one of them")
    for option, count in (("--folds", folds), ("--members", members)):
        if count is not None and not FEWEST <= count <= MOST:
            raise StudyError(
                f"{option} {count}: an ensemble has {FEWEST} to {MOST} networks; leave it out for one, trained on all "
                "images"
            )


# What is refitted ---------------------------------------------------------------------------------------------------


def _choose(
    study: Study, trial: str, *, confirm: bool, data: Path | None, device_name: str | None, interrupts: Interrupts
) -> _Chosen:
    """What the person asked for: a trial by its number, the study's best by its one score, or the confirmed winner."""
    if trial != "best":
        if not trial.isdecimal():
            raise StudyError(f"hpo refit {trial}: give `best`, or the number of a complete trial")
        return _of_trial(study, int(trial), f"trial {int(trial)}", f"{int(trial):05d}")
    if study.confirms is not None:
        raise StudyError(f"study {study.name} is the confirmation of {study.confirms}; give --study {study.confirms}")
    best = study.best_trial()
    if best is None:
        raise StudyError(f"study {study.name} has no complete trial yet; go on with it by hpo run")
    if confirm:
        return _winner(study, data=data, device_name=device_name, interrupts=interrupts)
    say(f"not confirmed: trial {best.number} is the best by its one validation score, {study.metric} {best.value:.4f}")
    if study.paths.confirmation.exists():
        say(f"  what {study.paths.confirmation} says is left aside (--no-confirm)")
    return _of_trial(study, best.number, f"trial {best.number}", "best")


def _winner(study: Study, *, data: Path | None, device_name: str | None, interrupts: Interrupts) -> _Chosen:
    """The winner of the study's confirmation, which is trained first where it is missing or the study has gone on."""
    known = read_confirmation(study.paths.confirmation)
    current = known is not None and is_current(known, study.counts().finished)
    if not current:
        say(f"first, is the best of study {study.name} better than its base? hpo confirm (--no-confirm leaves it out)")
    confirmation = confirmed(study, data=data, device_name=device_name, interrupts=interrupts)
    winner = confirmation.contender(confirmation.winner)
    what = winner.name
    if not current:
        say()
        for line in confirmation.lines():
            say(line)
        say()
    if confirmation.verdict.startswith(NO_GAIN):
        say(f"{NO_GAIN}: the baseline is refitted")
        if current:
            say(f"  {confirmation.verdict.removeprefix(NO_GAIN).removeprefix(': ')}")
    elif current:
        say(f"confirmed: {what}, {confirmation.metric} {confirmation.verdict}")
    if winner.trial is not None:
        return _of_trial(study, winner.trial, what, "best", winner.recipe, confirmation)
    config = TrainConfig.model_validate_json(json.dumps(winner.config))
    return _Chosen(what, "best", None, winner.recipe, config, winner.epochs, confirmation)


def _of_trial(
    study: Study,
    number: int,
    what: str,
    label: str,
    recipe: str | None = None,
    confirmation: Confirmation | None = None,
) -> _Chosen:
    """A complete trial, as the study has it."""
    trained = study.trained(number)
    return _Chosen(what, label, number, recipe, trained.config, trained.epochs, confirmation)


def _how(chosen: _Chosen, folds: int | None, members: int | None) -> str:
    """How many networks are trained, in words; of one, nothing."""
    if folds is not None:
        return f" as {folds} networks, each without another part of the images"
    if members is None:
        return ""
    judged_on = ", validated on data.val_fraction in place of folds" if chosen.config.data.folds is not None else ""
    return f" as {members} networks from {members} seeds{judged_on}"


# What came of it ----------------------------------------------------------------------------------------------------


def _say_refitted(done: Refitted, study: Study, dataset: Dataset, *, validation: str) -> None:
    """What validation decided, what the test says, where the model is, and how to use it."""
    _say_decided(done, study.metric, validation)
    scores = ["accuracy", "macro_f1", "loss"]
    if study.metric == "balanced_accuracy":
        scores.insert(1, study.metric)
    plain = done.views == "none" and done.temperature == 1
    as_it_answers = [done.views, f"{done.temperature:.3g}"]
    table(
        ["images", "views", "temperature", *(METRIC_WORDS.get(score, score) for score in scores)],
        [
            [validation, *as_it_answers, *_values(done.val, scores)],
            *([] if plain else [["test", "none", "1", *_values(done.test_plain, scores)]]),
            ["test", *as_it_answers, *_values(done.test, scores)],
            ["  95 % interval", "", "", *("{:.4f}–{:.4f}".format(*done.intervals[score]) for score in scores)],
        ],
        right=range(2, 3 + len(scores)),
    )
    say_per_class(done.test_per_class, dataset.labels, images=f"{dataset.n_test:,} test images")
    times = "once" if done.openings == 1 else f"{done.openings} times"
    say(f"the test set of this study has now been opened {times}")
    if done.onnx_difference is not None:
        say(f"ONNX: its probabilities lie within {done.onnx_difference:.1e} of torch's")
    say(f"written to {done.dir}, the model's card is its README.md")
    say()
    say("next:")
    storage = ["--storage", study.storage_shown] if is_masked(study.storage_shown) else []
    say(f"  hpo predict {shlex.quote(str(done.dir))} IMAGES -o submission.csv")
    say(f"  {shlex.join(['hpo', 'report', study.name, *storage])}")


def _say_decided(done: Refitted, metric: str, validation: str) -> None:
    """The choices, and what they were made by."""
    decision, words = done.decision, METRIC_WORDS[metric]
    say(f"decided on {len(decision.labels):,} {validation} images:")
    say(f"  test-time augmentation by {words}: {_each(decision.candidates)}; chosen: {decision.views}")
    temperature = decision.temperature
    before, after = temperature.before.loss, temperature.after.loss
    changed = "" if temperature.value == 1 else f"; loss {before:.4f} before, {after:.4f} after"
    why = "" if temperature.why is None else f" ({temperature.why})"
    say(f"  temperature: {temperature.value:.3g}{why}{changed}")
    if decision.forms:
        say(f"  form by {words}: {_each(decision.forms)}; chosen: {decision.form}")


def _each(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _values(scores: Scores, names: list[str]) -> list[str]:
    return [f"{getattr(scores, name):.4f}" for name in names]
