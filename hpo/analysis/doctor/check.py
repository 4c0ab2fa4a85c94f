"""A study under examination, and the results of its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from core.errors import CoreError
from hpo.errors import HpoError, StudyError
from hpo.paths import StudyPaths, is_confirmation, no_studies, studies_root
from hpo.storage.urls import words_of
from hpo.study import Study, find_study, join_study
from hpo.study.metadata import read_metadata, storage_url_of
from hpo.trials import effective_trials

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Finding:
    """A problem."""

    problem: str
    advice: str
    fix: Callable[[], object] | None = None
    """Fixes it, and does nothing the second time; None if only the user can fix it."""


@dataclass(frozen=True)
class Note:
    """Something worth knowing that is no problem."""

    text: str


Result = Finding | Note


class StudyCheck:
    """A study, as far as it can be read; by default on the storage of study.yaml or its own journal.

    Raises:
        StudyError: the given storage is not the study's, or lacks the password.
    """

    def __init__(self, name: str, storage_url: str | None = None) -> None:
        self.paths = StudyPaths.of(name)
        self.study: Study | None = None
        """Set once the storage could be read."""
        try:
            metadata = self.metadata
        except StudyError:  # a finding of its own
            metadata = None
        self.url = storage_url_of(self.paths, metadata, storage_url)

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def metadata(self) -> dict[str, Any] | None:
        """The content of study.yaml; None without the file, StudyError if it cannot be read."""
        return read_metadata(self.paths)

    @property
    def readable(self) -> Study:
        """The study, for checks that run only if its storage could be read."""
        assert self.study is not None
        return self.study

    @cached_property
    def trials(self) -> list[FrozenTrial]:
        """All trials, interrupted attempts included."""
        return self.readable.optuna.get_trials(deepcopy=False)

    @property
    def unfinished(self) -> int:
        """The number of trials still to be trained."""
        states = [trial.state for trial in effective_trials(self.trials).values()]
        return max(self.readable.total or 0, len(states)) - sum(state in FINISHED for state in states)

    def open(self) -> Study:
        return find_study(self.name, storage_url=self.url)


def find_study_check(name: str | None, *, storage_url: str | None) -> StudyCheck:
    """Find the study of that name, or the last one that ran, however damaged.

    Raises:
        StudyError: there is none, or `storage_url` is not its storage.
    """
    folders = studies_root().iterdir() if studies_root().is_dir() else []
    times = {paths.name: seen for paths in map(StudyPaths, folders) if (seen := _last_change(paths)) is not None}
    if name is None:
        searches = [known for known in times if not is_confirmation(known)]
        if not searches:
            raise StudyError(no_studies())
        return StudyCheck(max(searches, key=times.__getitem__), storage_url)
    if name not in times and storage_url is None:
        return StudyCheck(find_study(name).name)  # raises an error that lists the studies
    if name not in times:
        join_study(name, storage_url=storage_url)  # raises an error if the storage has no such study
    return StudyCheck(name, storage_url)


def _last_change(paths: StudyPaths) -> float | None:
    """None if the folder has no study."""
    files = [file for file in (paths.study_yaml, paths.journal) if file.exists()]
    return max((file.stat().st_mtime for file in files), default=None)


def guarded(check: StudyCheck, name: str, run: Callable[[StudyCheck], Iterable[Result] | None]) -> Iterator[Result]:
    """Run a check; an error becomes a finding."""
    try:
        yield from run(check) or ()
    except (HpoError, CoreError) as error:
        problem, _, advice = str(error).partition("; ")
        yield Finding(problem, advice or "it has to be fixed by hand")
    except Exception as error:
        words = words_of(check.url, error)
        yield Finding(f"{name}: the check failed ({type(error).__name__}: {words})", "check it by hand")
