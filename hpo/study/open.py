"""Creates, finds, resumes, joins and lists studies."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning

from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmed_by, is_confirmation, studies_root
from hpo.space import ConfirmationSpace
from hpo.space.pruner import build_pruner
from hpo.space.samplers import build_sampler
from hpo.storage import is_journal, mask, open_storage
from hpo.study.metadata import (
    METADATA,
    check_same,
    data_path_of,
    new_metadata,
    read_metadata,
    shown_attributes,
    skips_broken,
    storage_url_of,
    write_metadata,
)
from hpo.study.warm_start import take_over_trials

if TYPE_CHECKING:
    from core.data import Dataset
    from hpo.space import SearchSpace

from hpo.study.study import Study, space_of

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.\-]{0,99}")


def open_study(
    space: SearchSpace,
    *,
    name: str,
    dataset: Dataset,
    storage_url: str | None = None,
    seed: int | None = None,
    data_path: Path | None = None,
    take_over: str | None = None,
    patient: bool = False,
) -> Study:
    """Creates the study, or goes on to it.

    Args:
        storage_url: an Optuna storage URL or a journal's path; None is the study's own, for a new study a journal file.
        seed: the study's; None is the study's own, for a new study 0.
        data_path: what `--data` is, to be remembered.
        take_over: a study whose trials begin this one, where they fit.
        patient: whether a database's server that does not answer is waited for, as it is later on.

    Raises:
        StudyError: the study was begun with another space, seed, storage or data; or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # `hpo` has a progress display of its own
    if not isinstance(space, ConfirmationSpace):
        check_search_name(name)
    paths = StudyPaths.of(_checked(name))
    written = read_metadata(paths)
    url = storage_url_of(paths, written, storage_url)
    if written is not None and is_journal(url) and not Path(url).exists():
        raise StudyError(f"{url} is gone, but {paths.study_yaml} is there; put the journal back, or delete {paths.dir}")
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(url, patient=patient),
        direction=space.direction,
        load_if_exists=True,
        sampler=build_sampler(space.sampler, seed=seed or 0),
        pruner=build_pruner(space.pruner, space.baseline.epochs, space.baseline.data.folds),
    )
    stored = study.user_attrs.get(METADATA)
    if stored is None and study.get_trials(deepcopy=False):
        stored = study.user_attrs.get(METADATA)  # again: another process may have begun it and queued trials in between
        if stored is None:
            raise StudyError(f"storage {mask(url)} has a study {name} that hpo did not begin; choose another --study")
    if stored is None:
        stored = new_metadata(space, dataset, seed=seed or 0, data_path=data_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # an axis's name in the dashboard hangs on it, no more
            study.set_metric_names([space.metric])
        for key, value in shown_attributes(stored).items():
            study.set_user_attr(key, value)
        study.set_user_attr(METADATA, stored)  # last: with it the study has begun
    check_same(name, stored, space, dataset, seed)
    study.sampler = build_sampler(space.sampler, seed=stored["seed"])
    opened = Study(study, paths, stored, url, space)
    if take_over is not None:
        old = find_study(take_over)
        take_over_trials(
            study,
            stored,
            space,
            old_name=old.name,
            old_metadata=old.metadata,
            old_trials=old.optuna.get_trials(deepcopy=False),
        )
    write_metadata(paths, stored, storage_url=url, space=space, dataset=dataset)
    return opened


def find_study(name: str | None = None, *, storage_url: str | None = None) -> Study:
    """The study of that name, or the one that was run last, to be looked at.

    Raises:
        StudyError: there is none, or its storage cannot be opened.
    """
    if name is None:
        names = [known for known in _by_last_run() if not is_confirmation(known)]
        if not names:
            raise StudyError(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        name = names[0]
    paths = StudyPaths.of(_checked(name))
    metadata = read_metadata(paths)
    if metadata is None:
        known = sorted(_by_last_run())
        there = f"there are {', '.join(known)}" if known else "there are none; begin with: hpo run digits"
        raise StudyError(f"no study {name} in {studies_root()}; {there}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage_url_of(paths, metadata, storage_url)
    if is_journal(url) and not Path(url).exists():
        raise StudyError(f"study {name}: its journal {url} is gone; put it back, or delete {paths.dir}")
    storage = open_storage(url)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyError(f"storage {mask(url)} has no study {name}; give the right one by --storage") from error
    return Study(study, paths, metadata, url)


@dataclass(frozen=True)
class Joined:
    """A study that another process has begun, before its images are here."""

    name: str
    storage_url: str = field(repr=False)
    """It may hold a password."""
    metadata: Mapping[str, Any]
    space: SearchSpace

    @property
    def data_path(self) -> Path | None:
        """What `--data` was when the study began."""
        return data_path_of(self.metadata)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return skips_broken(self.metadata)

    def open(self, dataset: Dataset, *, data_path: Path | None) -> Study:
        """The study, ready to be worked on.

        Raises:
            StudyError: these are not the images that it was begun with.
        """
        return open_study(
            self.space, name=self.name, dataset=dataset, storage_url=self.storage_url, data_path=data_path
        )


def join_study(name: str, *, storage_url: str | None = None) -> Joined:
    """A study that was begun here or, with its storage's URL, anywhere.

    Raises:
        StudyError: there is none, or its storage cannot be opened.
    """
    if storage_url is None or read_metadata(StudyPaths.of(_checked(name))) is not None:
        found = find_study(name, storage_url=storage_url)
        url, study = found.storage_url, found.optuna
    else:
        url = storage_url
        if is_journal(url) and not Path(url).exists():
            raise StudyError(f"storage {url}: there is no such journal; give the one that the study was begun with")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.load_study(study_name=name, storage=open_storage(url))
        except KeyError as error:
            raise StudyError(f"storage {mask(url)} has no study {name}; begin it by hpo run, --workers 0") from error
    attributes = study.user_attrs
    space = space_of(name, attributes)
    return Joined(name, url, attributes[METADATA], space)


def list_studies() -> list[Study]:
    """Every study that can be opened, the one that was run last first; the others are warned of."""
    studies = []
    for name in _by_last_run():
        try:
            studies.append(find_study(name))
        except StudyError as error:
            logger.warning("study %s cannot be opened: %s", name, error)
    return studies


def _by_last_run() -> list[str]:
    """The names of all studies, the one that was run last first."""
    root = studies_root()
    files = [StudyPaths(folder).study_yaml for folder in root.iterdir()] if root.is_dir() else []
    found = sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in found]


def check_search_name(name: str) -> None:
    """Raises StudyError where a search may not have this name."""
    if is_confirmation(_checked(name)):
        raise StudyError(f"study {name}: the ending is reserved for what hpo confirm trains; choose another --study")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(confirmed_by(name)):  # which may be as long as any, and its confirmation's is longer
        raise StudyError(
            f"--study {name!r}: a name is letters, digits, _ . - and begins with no . or -; choose another"
        )
    return name
