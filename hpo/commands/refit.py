"""`hpo refit`: a trial becomes a submission model."""

from __future__ import annotations

import shlex
from pathlib import Path

from core.data import Dataset
from core.metrics import Scores
from core.runtime import describe_device, select_device
from hpo.commands.common import memory_told, open_dataset, say_patience
from hpo.commands.scores import say_per_class, training_bars
from hpo.console import say, table
from hpo.errors import StudyError
from hpo.interrupts import Interrupts
from hpo.paths import refit_label
from hpo.refit import Refitted, refit
from hpo.study import Study, find_study

# Networks of an ensemble: what `data.folds` allows.
FEWEST, MOST = 2, 20


def refit_command(
    trial: str,
    *,
    study_name: str | None,
    storage: str | None,
    data: Path | None,
    folds: int | None,
    device_name: str | None,
) -> None:
    """Retrains a trial, opens the test set, and says what came of it."""
    if folds is not None and not FEWEST <= folds <= MOST:
        raise StudyError(
            f"--folds {folds}: an ensemble has {FEWEST} to {MOST} networks; leave it out for one, trained on all images"
        )
    study = find_study(study_name, storage_url=storage)
    number, label = _choose(study, trial)
    device = select_device(device_name)
    chosen = study.trained(number)
    study.use_depot(None)
    study.bring_trial(number, folds=chosen.config.data.folds or 1)
    dataset = open_dataset(chosen.config.data, data or study.data_path, skip_broken=study.skip_broken)
    study.check_data(dataset)
    study.check_weights(chosen.config)
    say(f"study {study.name}, trial {number} ({study.metric} {chosen.value:.4f}); {describe_device(device)}")
    shown_epochs = chosen.epochs if folds is None else chosen.config.epochs
    with Interrupts(told=say_patience) as interrupts:
        bars = training_bars("refit", epochs=shown_epochs, metric=study.metric, interrupts=interrupts)
        try:
            with memory_told(), interrupts.patient(), bars as watch:
                done = refit(
                    study.paths,
                    number=number,
                    label=refit_label(label, folds),
                    config=chosen.config,
                    epochs=chosen.epochs,
                    dataset=dataset,
                    metric=study.metric,
                    device=device,
                    ensemble=folds,
                    watch=watch,
                )
        except KeyboardInterrupt:
            say("stopped; the same command goes on from the last checkpoint")
            raise
        validation = "validation" if folds is None and chosen.config.data.folds is None else "out-of-fold"
        _say_refitted(done, dataset, metric=study.metric, validation=validation)


def _say_refitted(done: Refitted, dataset: Dataset, *, metric: str, validation: str) -> None:
    """What came of it, and how to use it."""
    candidates = ", ".join(f"{views} {value:.4f}" for views, value in done.candidates.items())
    say(f"test-time augmentation by validation {metric}: {candidates}; chosen: {done.views}")
    table(
        ["images", "views", "accuracy", "macro-F1", "loss"],
        [
            [validation, done.views, *_three(done.val)],
            *([["test", "none", *_three(done.test_plain)]] if done.views != "none" else []),
            ["test", done.views, *_three(done.test)],
        ],
        right=(2, 3, 4),
    )
    say_per_class(done.test_per_class, dataset.labels, images=f"{dataset.n_test:,} test images")
    times = "once" if done.openings == 1 else f"{done.openings} times"
    say(f"the test set of this study has now been opened {times}")
    say(f"written to {done.dir}; label images of your own with")
    say(f"  hpo predict {shlex.quote(str(done.dir))} IMAGES -o submission.csv")


def _choose(study: Study, trial: str) -> tuple[int, str]:
    """(the trial's number, the name of the bundle's folder)."""
    if trial == "best":
        best = study.best_trial()
        if best is None:
            raise StudyError(f"study {study.name} has no complete trial yet; go on with it by hpo run")
        return best.number, "best"
    if not trial.isdecimal():
        raise StudyError(f"hpo refit {trial}: give `best`, or the number of a complete trial")
    return int(trial), f"{int(trial):05d}"


def _three(scores: Scores) -> list[str]:
    return [f"{scores.accuracy:.4f}", f"{scores.macro_f1:.4f}", f"{scores.loss:.4f}"]
