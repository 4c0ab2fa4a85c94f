"""`hpo report`: a study as one HTML file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hpo.cli.console import say
from hpo.errors import StudyError
from hpo.report import write_report
from hpo.study import Study, find_study
from hpo.text import duration


def report_command(
    study: str | None, *, storage: str | None, data: Path | None, output: Path | None, compare: Sequence[str]
) -> None:
    """Writes the report, and says where it is and what could not be shown."""
    started = time.perf_counter()
    found = find_study(study, storage_url=storage)
    others = [find_study(name) for name in compare]
    for each in (found, *others):
        _check_begun(each)
    if any(each.name == found.name for each in others):
        raise StudyError(f"--compare {found.name}: that is the study itself; name another one")
    path = output or _usual_path(found, others)
    if path.is_dir():
        raise StudyError(f"--output {path} is a folder; give the HTML file's name")
    missing = write_report(found, path, data=data, compare=others)
    size = path.stat().st_size / 1e6
    say(f"written to {path} ({size:.1f} MB) in {duration(time.perf_counter() - started)}; open it in a browser")
    for line in missing:
        say(f"  not shown: {line}")


def _check_begun(study: Study) -> None:
    if study.confirms is not None:
        raise StudyError(
            f"study {study.name} confirms {study.confirms}, whose report shows it: hpo report {study.confirms}"
        )
    counts = study.counts()
    if counts.finished + counts.running == 0:
        how = study.command or f"hpo run {study.space_name} --study {study.name}"
        raise StudyError(f"study {study.name} has no trial yet; begin with: {how}")


def _usual_path(study: Study, others: Sequence[Study]) -> Path:
    """In the study's folder; a comparison leaves the study's own report alone."""
    report = study.paths.report
    return report.with_stem("-".join([report.stem, *(each.name for each in others)])) if others else report
