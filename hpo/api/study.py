"""`hpo study`, `hpo report` and `hpo dashboard`: views of a study, and its checks."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.analysis.summary import StudySummary, summarize
from hpo.api.options import (
    AddOptions,
    DashboardOptions,
    DoctorOptions,
    ExportOptions,
    ReportOptions,
    TrialsOptions,
    setting_texts,
)
from hpo.errors import StudyError
from hpo.report.words import no_trials
from hpo.reporter import Reporter, Silent
from hpo.space.document import flow
from hpo.storage.atomic import write_output
from hpo.storage.urls import words_of
from hpo.study import Study, find_study, join_study
from hpo.study import list_studies as open_studies

if TYPE_CHECKING:
    import pandas

    from hpo.analysis.doctor.check import Finding, Result, StudyCheck
    from hpo.confirmation.recipe import ExportedTrial

logger = logging.getLogger(__name__)


def list_studies() -> list[tuple[Study, StudySummary]]:
    """Return all studies that can be read, the one that ran last first; warn of each other."""
    found = []
    for study in open_studies():
        try:
            found.append((study, summarize(study)))
        except Exception as error:  # a damaged study hides no other
            logger.warning(
                "study %s cannot be read (%s: %s); check it by: hpo study doctor %s",
                *(study.name, type(error).__name__, error, study.name),
            )
    return found


def trials(options: TrialsOptions) -> tuple[Study, pandas.DataFrame]:
    """Return a study and all its trials, and write them to `options.output` as CSV."""
    from hpo.study.dataframe import trials_frame

    study = find_study(options.study, storage_url=options.storage)
    frame = trials_frame(study)
    if options.output is not None:
        write_output(options.output, frame.to_csv(index=False))
    return study, frame


# Pages --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportResult:
    """A written report."""

    path: Path
    missing: Sequence[str]
    """Parts that could not be shown, with the reason."""


def report(options: ReportOptions) -> ReportResult:
    """Write a study as one HTML file that needs no network.

    Raises:
        HpoError: A study does not exist or has no trial, or the file cannot be written.
    """
    from hpo.report import write_report

    study = find_study(options.study, storage_url=options.storage)
    others = [find_study(name) for name in options.compare]
    for each in (study, *others):
        _check_started(each)
    if any(each.name == study.name for each in others):
        raise StudyError(f"--compare {study.name}: that is the study itself; name another one")
    path = options.output
    if path is None:  # a comparison does not replace the study's own report
        path = study.paths.report
        path = path.with_stem("-".join([path.stem, *(each.name for each in others)]))
    return ReportResult(path, write_report(study, path, data=options.data, compare=others))


def _check_started(study: Study) -> None:
    if study.confirms is not None:
        raise StudyError(
            f"study {study.name} confirms {study.confirms}, whose report shows it: hpo report {study.confirms}"
        )
    counts = study.counts()
    if counts.finished + counts.running == 0:
        raise StudyError(no_trials(study))


def dashboard(options: DashboardOptions, reporter: Reporter | None = None) -> None:
    """Serve optuna-dashboard on a study until Ctrl-C.

    Raises:
        StudyError: There is no such study, or the address cannot be listened on.
    """
    from hpo.dashboard.serve import command, serve

    say = (reporter or Silent()).say
    study = find_study(options.study, storage_url=options.storage)
    if study.files.dashboard_folder is not None:
        plain = shlex.join(command(study.storage_url, study.files.dashboard_folder))
        say(f"without hpo, showing the pictures that were opened here or drawn by a run: {plain}")
    study.files.use_store(None)
    serve(study, host=options.host, port=options.port, say=say)


# Doctor -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """The state of a study's storage and files."""

    check: StudyCheck
    results: Sequence[Result]
    """Findings and notes, after the repairs."""
    fixed: Sequence[Finding]
    failed: Sequence[tuple[Finding, str]]
    """Findings whose repair failed, with the error."""
    disk: dict[str, int]
    """Bytes by kind of file."""

    @property
    def findings(self) -> list[Finding]:
        """The remaining problems."""
        from hpo.analysis.doctor.check import Finding

        return [each for each in self.results if isinstance(each, Finding)]


def doctor(options: DoctorOptions) -> Diagnosis:
    """Check a study, and with `options.mend` fix the problems that can be fixed."""
    from hpo.analysis.doctor.check import StudyCheck, find_study_check
    from hpo.analysis.doctor.files import disk_use
    from hpo.analysis.doctor.run import run_checks

    check = find_study_check(options.study, storage_url=options.storage)
    diagnosis = Diagnosis(check, run_checks(check), (), (), disk_use(check.paths))
    fixable = [finding for finding in diagnosis.findings if finding.fix is not None]
    if not (options.mend and fixable):
        return diagnosis
    failed = []
    for finding in fixable:
        assert finding.fix is not None
        try:
            finding.fix()
        except Exception as error:  # the others are fixed all the same
            failed.append((finding, words_of(check.url, error)))
    after = Diagnosis(check, run_checks(StudyCheck(check.name, options.storage)), (), failed, disk_use(check.paths))
    left = {finding.problem for finding in after.findings}
    return replace(after, fixed=[finding for finding in fixable if finding.problem not in left])


# One more trial ----------------------------------------------------------------------------------------------------


def add(options: AddOptions) -> tuple[Study, dict[str, Any]]:
    """Queue a trial with the given parameters, and the baseline's values of the others.

    Returns:
        The study, whose total is one larger, and all parameters of the trial.

    Raises:
        HpoError: There is no such study, a field is not searched, or a value is outside its range.
    """
    from hpo.space import override_config

    if not options.params:
        raise StudyError("--params is missing; give the searched fields that differ from the baseline's")
    study = join_study(options.study, storage_url=options.storage)
    if study.confirms is not None:
        raise StudyError(f"study {study.name} is a confirmation, and searches nothing; give {study.confirms}")
    space, given = study.space(), setting_texts(options.params)
    fields = [text.partition("=")[0] for text in given]
    if unknown := [field for field in fields if field not in space.search]:
        searched = ", ".join(space.search)
        raise StudyError(f"--params {unknown[0]}: study {study.name} does not search it; it searches {searched}")
    params = space.express(override_config(space.baseline, options.params))
    if params is None:
        ranges = "; ".join(f"{field}: {flow(space.search[field].describe())}" for field in fields)
        raise StudyError(f"--params {' '.join(given)}: study {study.name} cannot draw that; {ranges}")
    study.queue.enqueue([(params, {})])
    return study, params


# A trial as a recipe ------------------------------------------------------------------------------------------------


def export(options: ExportOptions) -> tuple[ExportedTrial, str]:
    """Return a trial, and its text as a recipe or a script, which is written to `options.output`.

    Raises:
        HpoError: There is no such trial, it has no configuration yet, or the file cannot be written.
    """
    from hpo.confirmation.recipe import exported

    study = find_study(options.study, storage_url=options.storage)
    trial = exported(study, options.trial)
    text = trial.script() if options.python else trial.recipe()
    write_output(options.output, text)
    return trial, text
