"""Checks that images, pretrained weights, code and versions are those with which the study began."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from core.errors import CoreError
from hpo.analysis.doctor.check import Finding, Note, Result, StudyCheck, guarded
from hpo.analysis.study_data import load_images
from hpo.study.images import changed_images
from hpo.study.metadata import check_code, check_weights
from hpo.study.versions import versions


def images(check: StudyCheck) -> Iterator[Result]:
    """Check that the images can be read and have not changed."""
    study = check.readable
    where = study.data_name if study.data_path is None else str(study.data_path)
    try:
        dataset = load_images(study, download=False)
    except CoreError as error:
        yield Finding(f"the study's images ({where}) cannot be read: {error}", "restore them, or give them by --data")
        return
    known = study.metadata["data"]["fingerprint"]
    if dataset.fingerprint != known:
        yield Finding(
            f"the images in {where} have changed since the study began (fingerprint {dataset.fingerprint[:12]}, not "
            f"{known[:12]}): {changed_images(study.paths, study.metadata, dataset)}",
            "restore the old ones, or begin another study",
        )


def weights(check: StudyCheck) -> Iterator[Result]:
    """Check that the files of pretrained weights have not changed."""
    for file in check.readable.metadata.get("weights") or {}:
        yield from guarded(check, file, partial(_check_weights, file))


def _check_weights(file: str, check: StudyCheck) -> None:
    check_weights(check.name, check.readable.metadata, [file])


def code(check: StudyCheck) -> Iterator[Result]:
    """Check that the user's own code can be imported, and has not changed."""
    for path in check.readable.metadata.get("code") or {}:
        yield from guarded(check, path, partial(_check_code, path))


def _check_code(path: str, check: StudyCheck) -> None:
    check_code(check.name, check.readable.metadata, {path: "code"})


def versions_differ(check: StudyCheck) -> Iterator[Result]:
    """Compare the versions of the packages."""
    began, here = check.readable.metadata.get("versions", {}), versions()
    differences = [f"{p} {here.get(p, 'none')}, not {began[p]}" for p in began if here.get(p) != began[p]]
    if differences:
        yield Note(f"versions have changed since the study began: {'; '.join(differences)}")
