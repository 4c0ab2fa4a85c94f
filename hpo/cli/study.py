"""`hpo study` and `hpo dashboard`: looking after studies, and at them."""

from __future__ import annotations

import shlex

from hpo.analysis.doctor.check import Finding, Result, StudyCheck, find_study_check
from hpo.analysis.doctor.files import disk_use
from hpo.analysis.doctor.run import run_checks
from hpo.analysis.summary import summarize
from hpo.cli.console import say, table
from hpo.cli.summary import print_summary
from hpo.dashboard import serve as dashboard
from hpo.paths import studies_root
from hpo.report.words import states_text
from hpo.storage import is_masked, mask
from hpo.storage.urls import words_of
from hpo.study import find_study, list_studies
from hpo.text import count, in_words


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
    check = find_study_check(name, storage_url=storage)
    results = run_checks(check)
    if mend and any(finding.fix is not None for finding in _findings(results)):
        results = _fixed(check, _findings(results), storage)
    findings = _findings(results)
    for each in results:
        say(f"{each.problem}; {each.advice}" if isinstance(each, Finding) else f"note: {each.text}")
    _say_verdict(check, findings)
    used = sorted(disk_use(check.paths).items(), key=lambda kind: -kind[1])
    if used:
        kinds = ", ".join(f"{kind} {in_words(size)}" for kind, size in used)
        say(f"on the disk: {in_words(sum(size for _, size in used))}: {kinds}")
    return not findings


def _fixed(check: StudyCheck, findings: list[Finding], storage: str | None) -> list[Result]:
    """Fix the findings that can be fixed, print them, and check again."""
    fixable = [finding for finding in findings if finding.fix is not None]
    for finding in fixable:
        assert finding.fix is not None
        try:
            finding.fix()
        except Exception as error:  # the others are fixed all the same
            say(f"could not be fixed: {finding.problem}: {words_of(check.url, error)}")
    results = run_checks(StudyCheck(check.name, storage))
    left = {finding.problem for finding in _findings(results)}
    for finding in fixable:
        if finding.problem not in left:
            say(f"fixed: {finding.problem}")
    return results


def _findings(results: list[Result]) -> list[Finding]:
    return [each for each in results if isinstance(each, Finding)]


def _say_verdict(check: StudyCheck, findings: list[Finding]) -> None:
    if not findings:
        say(f"no problem found in study {check.name}")
        return
    say(f"study {check.name}: {count(len(findings), 'problem')} found")
    fixable = sum(finding.fix is not None for finding in findings)
    if fixable:
        say(f"  {fixable} can be fixed: {_fix_command(check)}")


def _fix_command(check: StudyCheck) -> str:
    """The command that fixes the findings; a masked password has to be given again."""
    storage = f" --storage {shlex.quote(shown)}" if is_masked(shown := mask(check.url)) else ""
    return f"hpo study doctor {shlex.quote(check.name)}{storage} --mend"


def dashboard_command(name: str | None, *, storage: str | None, port: int, host: str) -> None:
    """Serves optuna-dashboard on a study until Ctrl-C."""
    study = find_study(name, storage_url=storage)
    if study.artifact_dir is not None:
        plain = shlex.join(dashboard.command(study.storage_url, study.artifact_dir))
        say(f"without hpo, showing the pictures that were opened here or drawn by a run: {plain}")
    study.use_depot(None)
    dashboard.serve(study, host=host, port=port, say=say)
