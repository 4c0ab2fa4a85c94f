"""Create, resume, find, join and list studies."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmed_by, is_confirmation, no_studies, studies_root
from hpo.storage import METADATA, is_journal, mask, open_storage
from hpo.storage.optuna_access import attribute_of, set_attribute
from hpo.study.images import write_list
from hpo.study.metadata import (
    check_same,
    new_metadata,
    read_metadata,
    shown_attributes,
    storage_url_of,
    upgraded,
    write_metadata,
)

if TYPE_CHECKING:
    import optuna

    from core.data import Dataset
    from hpo.space import SearchSpace
    from hpo.study.study import Study

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
    """Create a study to run trials in, or resume it.

    Args:
        storage_url: An Optuna storage URL or a journal's path; None for the study's own, in a new study a journal.
        seed: None for the study's own, in a new study 0.
        take_over: Name of a study whose fitting trials are imported into a new one.
        patient: Wait for a database server that does not answer yet.

    Raises:
        StudyError: The study has another space, seed, storage or data; or the storage cannot be opened.
    """
    from hpo.space.samplers import build_sampler
    from hpo.study.study import Study
    from hpo.study.take_over import import_trials

    paths = StudyPaths.of(_checked(name))
    written = read_metadata(paths)
    url = storage_url_of(paths, written, storage_url)
    if written is not None and _is_lost(url):
        raise StudyError(
            f"{mask(url)} is gone, but {paths.study_yaml} is there; put the journal back, or delete {paths.dir}"
        )
    study = _create_or_load(name, url, space, patient=patient)
    metadata = _metadata_of(study, url) or _begin(study, new_metadata(space, dataset, seed=seed, data_path=data_path))
    check_same(name, metadata, space, dataset, seed, command=study.user_attrs.get("command"))
    study.sampler = build_sampler(space.sampler, seed=metadata["seed"])
    if take_over is not None:
        import_trials(study, metadata, space, source=find_study(take_over))
    write_metadata(paths, metadata, storage_url=url, space=space, dataset=dataset)
    write_list(paths, dataset)
    return Study(study, paths, metadata, url, space)


def _create_or_load(name: str, url: str, space: SearchSpace, *, patient: bool) -> optuna.Study:
    import optuna

    from hpo.space.pruner import build_pruner

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna would log every trial into the progress display
    return optuna.create_study(
        study_name=name,
        storage=open_storage(url, patient=patient),
        direction=space.direction,
        load_if_exists=True,
        pruner=build_pruner(space.pruner, space.baseline.epochs, space.baseline.data.folds),
    )


def _metadata_of(study: optuna.Study, url: str) -> dict[str, Any] | None:
    """None for a new study."""
    stored: dict[str, Any] | None = attribute_of(study, METADATA)
    if stored is None and study.get_trials(deepcopy=False):
        stored = attribute_of(study, METADATA)  # again: another process may have begun it and queued trials in between
        if stored is None:
            raise StudyError(
                f"storage {mask(url)} has a study {study.study_name} that hpo did not begin; choose another --study"
            )
    return None if stored is None else upgraded(stored)


def _begin(study: optuna.Study, metadata: dict[str, Any]) -> dict[str, Any]:
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # set_metric_names only labels an axis in the dashboard
        study.set_metric_names([metadata["metric"]])
    for key, value in shown_attributes(metadata).items():
        study.set_user_attr(key, value)
    set_attribute(study, METADATA, metadata)  # last: a study with metadata has begun
    return metadata


def find_study(name: str | None = None, *, storage_url: str | None = None) -> Study:
    """Find a study to look at; without a name, the search that was run last.

    The storage's URL is only needed if the stored one lacks the password. StudyError if there is no such study.
    """
    paths, metadata = study_files(name)
    name, url = paths.name, storage_url_of(paths, metadata, storage_url)
    if _is_lost(url):
        raise StudyError(f"study {name}: its journal {mask(url)} is gone; put it back, or delete {paths.dir}")
    from hpo.study.study import Study

    return Study(_load(name, url, "give the right one by --storage"), paths, metadata, url)


def study_files(name: str | None = None) -> tuple[StudyPaths, dict[str, Any]]:
    """Find the paths and the metadata of a study without opening its storage; without a name, of the last search.

    StudyError if there is no such study.
    """
    name = last_search() if name is None else name
    paths = StudyPaths.of(_checked(name))
    metadata = read_metadata(paths)
    if metadata is None:
        known = sorted(_by_last_run())
        there = f"there are {', '.join(known)}" if known else "there are none; begin with: hpo run digits"
        raise StudyError(f"no study {name} in {studies_root()}; {there}")
    return paths, metadata


def last_search() -> str:
    """Return the name of the study that ran last; StudyError if there is none."""
    name = next((study for study in _by_last_run() if not is_confirmation(study)), None)
    if name is None:
        raise StudyError(no_studies())
    return name


def _is_lost(url: str) -> bool:
    return is_journal(url) and not Path(url).exists()


def _load(name: str, url: str, advice: str) -> optuna.Study:
    """`advice` ends the error message if there is no such study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyError(f"storage {mask(url)} has no study {name}; {advice}") from error


def join_study(name: str, *, storage_url: str | None = None) -> Study:
    """Find a study that was begun here or, given the URL of its storage, on any machine.

    Returns:
        The study with its space. To run trials in it, load its images and open it.
    """
    from hpo.study.study import Study, stored_space

    paths = StudyPaths.of(_checked(name))
    if storage_url is None or read_metadata(paths) is not None:
        found = find_study(name, storage_url=storage_url)
        url, study = found.storage_url, found.optuna
    else:
        url = storage_url_of(paths, None, storage_url)
        if _is_lost(url):
            raise StudyError(f"storage {url}: there is no such journal; give the one that the study was begun with")
        study = _load(name, url, "begin it by hpo run, --workers 0")
    space = stored_space(study)
    return Study(study, paths, upgraded(attribute_of(study, METADATA)), url, space)


def list_studies() -> list[Study]:
    """Return all studies, the last run first; warn of each that cannot be opened."""
    studies = []
    for name in _by_last_run():
        try:
            studies.append(find_study(name))
        except (StudyError, OSError) as error:
            logger.warning("study %s cannot be opened: %s", name, error)
    return studies


def _by_last_run() -> list[str]:
    files = [StudyPaths(folder).study_yaml for folder in studies_root().glob("*")]
    found = sorted(filter(Path.exists, files), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in found]


def check_search_name(name: str) -> None:
    """Raise StudyError if the name is not allowed."""
    if is_confirmation(_checked(name)):
        raise StudyError(f"study {name}: the ending is reserved for what hpo confirm trains; choose another --study")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(confirmed_by(name)):  # the name of a confirmation is longer than that of its search
        raise StudyError(
            f"--study {name!r}: a name is letters, digits, _ . - and begins with no . or -; choose another"
        )
    return name
