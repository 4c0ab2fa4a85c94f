"""`hpo study` and `hpo dashboard`: looking after studies, and at them."""

from __future__ import annotations

import shlex

from hpo.analysis.doctor import Finding, Patient, Told, disk_use, examine, find_patient
from hpo.analysis.summary import summarize
from hpo.cli.console import say, table
from hpo.cli.summary import print_summary
from hpo.dashboard import serve as dashboard
from hpo.paths import studies_root
from hpo.report.words import states_text
from hpo.storage import is_masked, mask
from hpo.storage.urls import words_of
from hpo.study import find_study, list_studies
from hpo.text import in_words


def list_command() -> None:
    """A line a study."""
    studies = list_studies()
    if not studies:
        say(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        return
    rows = []
    for study in studies:
        now = summarize(study)
        best = "" if now.best_value is None else f"{now.best_value:.4f}"
        rows.append([study.name, study.space_name, states_text(now.counts), study.metric, best, study.storage_shown])
    table(["study", "space", "trials", "objective", "best", "storage"], rows, right=(4,))


def show_command(name: str | None, *, storage: str | None) -> None:
    """All that is known of one study."""
    study = find_study(name, storage_url=storage)
    print_summary(study)


def doctor_command(name: str | None, *, storage: str | None, mend: bool) -> bool:
    """Says what is wrong with a study, and mends what can be; returns whether nothing is left."""
    patient = find_patient(name, storage_url=storage)
    told = examine(patient)
    if mend and any(finding.mend is not None for finding in _findings(told)):
        told = _mended(patient, _findings(told), storage)
    wrong = _findings(told)
    for each in told:
        say(f"{each.what}; {each.advice}" if isinstance(each, Finding) else f"note: {each.what}")
    _say_verdict(patient, wrong)
    used = sorted(disk_use(patient.paths).items(), key=lambda kind: -kind[1])
    if used:
        kinds = ", ".join(f"{kind} {in_words(size)}" for kind, size in used)
        say(f"on the disk: {in_words(sum(size for _, size in used))}: {kinds}")
    return not wrong


def _mended(patient: Patient, wrong: list[Finding], storage: str | None) -> list[Told]:
    """Mends what can be, says it, and returns what is told then."""
    for finding in wrong:
        if finding.mend is None:
            continue
        try:
            finding.mend()
        except Exception as error:  # the others are mended all the same
            say(f"could not be mended: {finding.what}: {words_of(patient.url, error)}")
    told = examine(Patient(patient.name, storage))
    left = {finding.what for finding in _findings(told)}
    for finding in wrong:
        if finding.mend is not None and finding.what not in left:
            say(f"mended: {finding.what}")
    return told


def _findings(told: list[Told]) -> list[Finding]:
    return [each for each in told if isinstance(each, Finding)]


def _say_verdict(patient: Patient, wrong: list[Finding]) -> None:
    if not wrong:
        say(f"nothing is wrong with study {patient.name}")
        return
    say(f"study {patient.name}: {len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong")
    mendable = sum(finding.mend is not None for finding in wrong)
    if mendable:
        password = f" --storage {shlex.quote(shown)}" if is_masked(shown := mask(patient.url)) else ""
        say(f"  {mendable} of it can be mended: hpo study doctor {shlex.quote(patient.name)}{password} --mend")


def dashboard_command(name: str | None, *, storage: str | None, port: int, host: str) -> None:
    """Serves optuna-dashboard on a study until Ctrl-C."""
    study = find_study(name, storage_url=storage)
    if study.artifact_dir is not None:
        plain = shlex.join(dashboard.command(study.storage_url, study.artifact_dir))
        say(f"without hpo, showing the pictures that were opened here or drawn by a run: {plain}")
    study.use_depot(None)
    dashboard.serve(study, host=host, port=port, say=say)
