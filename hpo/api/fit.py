"""`hpo fit`: from labelled images to a model by a deadline.

Each stage is the function of an existing command: search, confirm, refit, predict, report. A record in the study's
folder has the choices, the finished stages and the used time, so the same command continues after any interruption.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data.sources import check_source
from core.errors import CoreError
from core.text import count
from core.weights import weights_in
from hpo.api.options import (
    ConfirmOptions,
    FitOptions,
    PredictOptions,
    RefitOptions,
    ReportOptions,
    RunOptions,
    setting_texts,
)
from hpo.errors import BundleError, HpoError, StudyError, TimeLimitError
from hpo.paths import StudyPaths
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.study.fit_record import FitRecord
from hpo.text import duration

if TYPE_CHECKING:
    from core.data import Splits
    from hpo.api.fit_choice import Choice, Chooser
    from hpo.api.refit import RefitResult
    from hpo.study import Study

SEARCH, CONFIRM, REFIT, PREDICT, REPORT = "search", "confirm", "refit", "predict", "report"
STAGES = (SEARCH, CONFIRM, REFIT, PREDICT, REPORT)
"""In the order in which they run."""


@dataclass(frozen=True)
class FitResult:
    """The outcome of `fit`."""

    study: str
    """Name of the study."""
    model: Path
    """Folder of the submission model."""
    refit: RefitResult | None
    """None if the model was there before."""
    predictions: Path | None
    report: Path | None
    used_s: float
    """Seconds that all runs of the command have used."""
    before: bool
    """Whether all was finished before this run."""


def fit(
    options: FitOptions,
    reporter: Reporter | None = None,
    interrupts: Interrupts | None = None,
    *,
    began: float | None = None,
) -> FitResult:
    """Choose a search space that fits images and time, search, confirm, refit, predict and report, within the time.

    Args:
        began: When the time limit began to run, as `time.time()`; by default now.

    Raises:
        HpoError: An option is wrong, the time is too short for one training, or another fit has the study's name.
        CoreError: The images or the device cannot be used.
        KeyboardInterrupt: Stopped; the same call continues.
    """
    began = time.time() if began is None else began
    reporter, interrupts = reporter or Silent(), interrupts or Interrupts()
    paths = StudyPaths.of(options.study or f"fit-{_stem(options.data)}")
    if not paths.study_yaml.exists():
        check_source(options.data, options.path)
    given = _given(options)
    with FitRecord.opened(paths, {**given, "limit_s": options.time_s}, began=began) as record:
        _check_same(paths, record, given, options)
        try:
            with weights_in(options.weights):
                return _Fit(options, paths, record, reporter, interrupts).run()
        except (HpoError, CoreError):
            if not paths.study_yaml.exists():
                record.discard()
            raise
        except KeyboardInterrupt:
            reporter.say(f"{duration(max(0.0, record.left_s))} are left; the same command continues")
            raise


def _stem(data: str) -> str:
    """The data's name without its suffixes, as a part of a study's name."""
    name = Path(data).expanduser().resolve().name.split(".")[0]
    return "".join(sign if sign.isalnum() or sign in "_-" else "-" for sign in name)[:80].strip("-") or "images"


def _given(options: FitOptions) -> dict[str, Any]:
    """What a study keeps of the command; another value needs another study."""
    data = options.data if options.path is None else str(options.path.resolve())
    return {"data": data, "space": options.space, "set": setting_texts(options.set)}


def _checked(options: FitOptions) -> tuple[str, ...]:
    """Check the paths and the sample before anything is trained. Returns the ids of the images to label."""
    if options.predict is None:
        if options.like is not None:
            raise BundleError(f"--like {options.like}: give the images to label with --predict too")
        return ()
    from core.data import image_ids
    from hpo.submission.samples import Sample

    if not options.output.parent.is_dir():
        raise BundleError(f"{options.output}: cannot be written (there is no such folder); give -o another file")
    if options.like is not None:
        Sample.read(options.like, output=options.output)
    return image_ids(options.predict, skip_broken=options.skip_broken)


def _check_same(paths: StudyPaths, record: FitRecord, given: dict[str, Any], options: FitOptions) -> None:
    """Raise StudyError if the study was begun with other data, space or settings; take over a larger limit."""
    if not paths.study_yaml.exists():  # stopped before it began
        record.set(**given, limit_s=options.time_s, choice=None)
        return
    flags = {"data": "DATA", "space": "--space", "set": "--set"}
    for key, flag in flags.items():
        if record[key] != given[key]:
            raise StudyError(
                f"study {paths.name} was begun with {flag} {_shown(record[key])}, not {_shown(given[key])}; give the "
                "same, or another --study"
            )
    before_s = float(record["limit_s"])
    if options.limit_s is None or options.time_s == before_s:
        return
    if options.time_s < before_s:
        raise StudyError(
            f"study {paths.name} was begun with {duration(before_s)}, and {duration(options.time_s)} are less; give as "
            "much or more, or another --study"
        )
    record.set(limit_s=options.time_s, done={})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)


class _Fit:
    """One run of the command."""

    def __init__(
        self,
        options: FitOptions,
        paths: StudyPaths,
        record: FitRecord,
        reporter: Reporter,
        interrupts: Interrupts,
    ) -> None:
        self._options, self._paths, self._record = options, paths, record
        self._reporter, self._interrupts = reporter, interrupts
        self._say = reporter.say
        self._command = options.command()
        self._refitted: RefitResult | None = None

    def run(self) -> FitResult:
        record, before = self._record, self._is_finished()
        if not before:
            with self._interrupts.let_through():  # the stages decide for themselves
                self._begin()
            stages: dict[str, Callable[[], Any]] = {
                SEARCH: self._search,
                CONFIRM: self._confirm,
                REFIT: self._refit,
                PREDICT: self._predict,
                REPORT: self._report,
            }
            for stage, work in stages.items():
                if not self._is_done(stage):
                    record.finish(stage, work())
        return FitResult(
            self._paths.name,
            Path(record.done[REFIT]),
            self._refitted,
            _path(record.done[PREDICT]),
            _path(record.done[REPORT]),
            record.used_s,
            before,
        )

    def _is_finished(self) -> bool:
        return all(map(self._is_done, STAGES))

    def _is_done(self, stage: str) -> bool:
        if stage not in self._record.done:
            return False
        return stage != PREDICT or self._record.get("predicting") == self._predicting()

    def _predicting(self) -> list[str | None]:
        """What a submission depends on besides the model."""
        options = self._options
        return [
            None if path is None else str(path.expanduser().resolve())
            for path in (options.predict, options.like, options.output if options.predict else None)
        ]

    # Choice

    def _begin(self) -> None:
        """Check the paths, and choose once; another run continues with the recorded choice."""
        ids = _checked(self._options)
        if self._record.get("choice") is None:
            self._choose(ids)
            return
        left = f"{duration(max(0.0, self._record.left_s))} of {duration(float(self._record['limit_s']))} are left"
        done = [stage for stage in STAGES if self._is_done(stage)]
        after = f", after {', '.join(done)}" if done else ""
        self._say(f"continuing study {self._paths.name}{after}: {left}")

    def _choose(self, ids: tuple[str, ...]) -> None:
        from core.runtime import select_device
        from hpo.api.common import report_data
        from hpo.api.fit_choice import Chooser

        device = select_device(self._options.device)
        chooser = Chooser(self._options, device, self._reporter, to_predict=len(ids))
        choice, dataset, splits = chooser.choose(self._record.left_s)
        report_data(dataset, splits, self._reporter)
        if self._options.like is not None:
            from hpo.submission.samples import Sample

            Sample.read(self._options.like).form(ids, dataset.classes)
        choice = self._at_probed_length(chooser, choice, splits[0].to(device))
        plan = choice.plan
        self._record.set(
            choice={
                "space": choice.space,
                "settings": list(choice.settings),
                "data": None if chooser.data is None else str(chooser.data),
                "trials": choice.trials,
                "whole": choice.whole,
                "epochs": choice.epochs,
                "limit_s": self._record["limit_s"],
                "end_s": choice.end_s,
                "pass_s": choice.pass_s,
                **{key: getattr(plan, key) for key in ("search_s", "confirm_s", "refit_s", "after_s")},
            }
        )
        self._show(choice)

    def _at_probed_length(self, chooser: Chooser, choice: Choice, split: Splits) -> Choice:
        """Let a length probe choose the epochs of the trials, where the search has time for it."""
        if not chooser.probes(choice):
            return choice
        from hpo.api.length import run_length_probe
        from hpo.search.length import probe_of

        content = run_length_probe(
            self._paths,
            chooser.baseline,
            split,
            split.labels.device,
            self._reporter,
            self._interrupts,
            taken=True,
        )
        self._record.set(length_probe=content)
        probe = probe_of(content)
        if probe is None or probe.advised == probe.epochs:
            return choice
        return chooser.at_length(choice, probe.advised, self._record.left_s)

    def _show(self, choice: Choice) -> None:
        """Show the choice as the commands that do the same."""
        plan = choice.plan
        for line in choice.why:
            self._say(line)
        parts = {"search": plan.search_s, "confirmation": plan.confirm_s, "refit": plan.refit_s, "report": plan.after_s}
        times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
        self._say(
            f"space {choice.space}, {count(plan.epochs, 'epoch')} to a trial; "
            f"{duration(self._record.left_s)} are left: {times}"
        )
        self._say("the same by hand, to change a part:")
        for line in self._commands():
            self._say(f"  {line}")

    def _commands(self) -> list[str]:
        choice, name = self._record["choice"], self._paths.name
        lines = [self._run_options(choice["search_s"]).command()]
        if choice["confirm_s"]:
            lines.append(ConfirmOptions(study=name, minutes=_minutes(choice["confirm_s"])).command())
        lines.append(RefitOptions(trial="best", study=name, confirm=bool(choice["confirm_s"])).command())
        if self._options.predict is not None:
            lines.append(self._predict_options(name).command())
        return lines

    def _until(self, *after: str) -> float:
        """Seconds until these stages must begin, whose times grow with the limit."""
        choice = self._record["choice"]
        scale = float(self._record["limit_s"]) / float(choice["limit_s"])
        later_s = sum(float(choice[key]) * (1.0 if key == "after_s" else scale) for key in after)
        return self._record.left_s - later_s

    # Stages

    def _run_options(self, seconds: float, *, trials: int | None = None) -> RunOptions:
        choice = self._record["choice"]
        return RunOptions(
            space=choice["space"],
            data=choice["data"],
            study=self._paths.name,
            set=tuple(choice["settings"]),
            trials=trials or choice["trials"],
            patience=True,
            weights=self._options.weights,
            minutes=_minutes(seconds),
            device=self._options.device,
            skip_broken=self._options.skip_broken,
        )

    def _search(self) -> int:
        """Search until the other stages need the time. Returns the number of finished trials."""
        found = self._searched(self._until("confirm_s", "refit_s", "after_s"))
        if found.best_trial() is None:
            self._say("no trial is complete, and a model needs one: it goes on to its end")
            found = self._searched(None, trials=1)
        if found.best_trial() is not None and (more_s := self._more_s(found)) > 0:
            self._say(f"trainings are faster than the timed steps: the search goes on for {duration(more_s)}")
            found = self._searched(more_s)
        if found.best_trial() is None:
            raise StudyError(f"study {found.name}: no configuration could be trained; see hpo study show {found.name}")
        finished = found.counts().finished
        found.settings.total = finished  # the rest is not missing
        return finished

    def _more_s(self, study: Study) -> float:
        """Seconds that the search may still take by the real times of its trials; 0 if that is too little for one."""
        from hpo.api.fit_plan import confirmation_s

        if study.counts().finished >= self._record["choice"]["trials"] or study.patience.is_over:
            return 0.0
        left_s = self._until("after_s") - self._refit_s()
        confirm_s = confirmation_s(study.deadline.used_s + left_s, self._least_confirm_s())
        more_s = left_s - confirm_s
        return more_s if more_s > _trial_s(study) else 0.0

    def _searched(self, seconds: float | None, *, trials: int | None = None) -> Study:
        from hpo.api.search import search
        from hpo.study import find_study

        name = self._paths.name
        if seconds is None:
            options = self._run_options(60.0, trials=trials).model_copy(update={"minutes": None, "recipes": False})
        else:
            used_s = find_study(name).deadline.used_s if self._paths.study_yaml.exists() else 0.0
            options = self._run_options(used_s + max(seconds, 0.0), trials=trials)
        study = search(options, self._reporter, self._interrupts, part_of=self._command).study
        study.settings.length_probe = self._record.get("length_probe")
        return study

    def _confirm(self) -> str | None:
        """Confirm in the time that the refit leaves. Returns None if there is a confirmation, else the reason."""
        from hpo.api.confirm import confirm
        from hpo.paths import confirmation_of
        from hpo.study import find_study

        seconds = self._until("after_s") - self._refit_s()
        if seconds < (0 if self._record["choice"]["confirm_s"] else self._least_confirm_s()):
            return "no time"
        other = StudyPaths.of(confirmation_of(self._paths.name))
        used_s = find_study(other.name).deadline.used_s if other.study_yaml.exists() else 0.0
        options = ConfirmOptions(
            study=self._paths.name, minutes=_minutes(used_s + seconds), device=self._options.device
        )
        self._say()
        try:
            result = confirm(options, self._reporter, self._interrupts, part_of=self._command)
        except TimeLimitError:
            self._say("the time ended the confirmation before it could compare anything")
            return "no time"
        for line in result.confirmation.lines():
            self._say(line)
        return None

    def _refit_s(self) -> float:
        """Seconds to keep for the refit: its share, or less if all of its epochs take less."""
        from hpo.api.fit_length import length_of_refit
        from hpo.study import find_study

        share_s = self._until("after_s") - self._until("refit_s", "after_s")
        length = length_of_refit(find_study(self._paths.name), self._record["choice"])
        return min(share_s, length.longest_s) if length is not None and length.is_shortened else share_s

    def _least_confirm_s(self) -> float:
        """Seconds of a confirmation that was not planned: of the fewest trainings that can be compared."""
        from hpo.api.fit_plan import LEAST_TRAININGS
        from hpo.study import find_study

        return LEAST_TRAININGS * _trial_s(find_study(self._paths.name))

    def _say_kinds(self) -> None:
        """Say which of probe, fine-tuning and training from scratch is best."""
        from hpo.analysis.kinds import best_of_kinds
        from hpo.confirmation.result import read_confirmation
        from hpo.report.words import kinds_text
        from hpo.study import find_study

        study = find_study(self._paths.name)
        confirmation = read_confirmation(study.paths.confirmation) if self._record.done[CONFIRM] is None else None
        for line in kinds_text(best_of_kinds(study, confirmation), study.metric):
            self._say(line)

    def _refit(self) -> str:
        from hpo.api.refit import refit

        confirmed = self._record.done[CONFIRM] is None
        self._say()
        self._say_kinds()
        options = RefitOptions(
            trial="best",
            study=self._paths.name,
            confirm=confirmed,
            device=self._options.device,
            average=None if confirmed else "own",  # another needs a training of its own to be judged
        )
        length = self._length(confirmed=confirmed)
        self._refitted = refit(options, self._reporter, self._interrupts, left_s=self._left_to_refit, length=length)
        return str(self._refitted.refitted.dir)

    def _left_to_refit(self, passes: int) -> float:
        """Seconds until the model must be evaluated; `passes` as in `hpo.submission.Training`."""
        choice = self._record["choice"]
        return self._record.left_s - float(choice["end_s"]) - passes * float(choice["pass_s"])

    def _length(self, *, confirmed: bool) -> int | None:
        """Epochs of the refit, which the training itself shortens to fit the time; None to compare lengths.

        Where the trials were made shorter to fit the time, the refit has the length that the space was made for, and
        from scratch a greater one.
        Lengths are compared only where the trials have the space's length already.
        """
        from hpo.api.fit_length import length_of_refit
        from hpo.api.fit_plan import REPORT_S
        from hpo.confirmation.result import read_confirmation
        from hpo.study import find_study

        study = find_study(self._paths.name)
        confirmation = read_confirmation(study.paths.confirmation) if confirmed else None
        length = length_of_refit(study, self._record["choice"], confirmation)
        if length is None:
            return None
        fit = max(1, int((self._until("after_s") + REPORT_S) / length.epoch_s))  # without the report, if need be
        if fit < length.searched:
            what = f"a refit of {count(length.searched, 'epoch')}"
            self._say(f"{what} does not fit the time that is left: {fit} instead")
            return fit
        if not length.is_shortened:
            return None if confirmed else length.searched
        self._say(
            f"the refit has up to {count(length.longest, 'epoch')}, as many as fit; a trial has {length.searched}"
        )
        return length.longest

    def _predict_options(self, bundle: str) -> PredictOptions:
        options = self._options
        return PredictOptions(
            bundle=bundle,
            images=options.predict,
            output=options.output,
            like=options.like,
            skip_broken=options.skip_broken,
            device=options.device,
        )

    def _predict(self) -> str | None:
        if self._options.predict is None:
            self._record.set(predicting=self._predicting())
            return None
        from hpo.api.predict import predict

        with self._interrupts.let_through():
            predict(self._predict_options(self._record.done[REFIT]))
        self._record.set(predicting=self._predicting())
        return str(self._options.output)

    def _report(self) -> str | None:
        """Write the report, if its time is left."""
        from hpo.api.fit_plan import REPORT_S
        from hpo.api.study import report

        if self._record.left_s < REPORT_S / 2:
            self._say(f"no time is left for the report: hpo report {self._paths.name}")
            return None
        with self._interrupts.let_through():
            return str(report(ReportOptions(study=self._paths.name)).path)


def _trial_s(study: Study) -> float:
    """Time of the longest complete trial, in seconds; infinite without one."""
    from optuna.trial import TrialState

    complete = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max((float(trial.user_attrs.get("elapsed_s", 0.0)) for trial in complete), default=math.inf)


def _minutes(seconds: float) -> float:
    return max(0.05, round(seconds / 60, 2))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
