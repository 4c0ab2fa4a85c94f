"""The checks in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpo.analysis.doctor import files, origin, storage, trials
from hpo.analysis.doctor.check import Result, StudyCheck, guarded

Checks = dict[str, Callable[[StudyCheck], Iterable[Result]]]

FILE_CHECKS: Checks = {
    "the journal's lock": storage.lock,
    "the storage": storage.storage,
    "study.yaml": storage.study_yaml,
    "leftovers": files.leftovers,
    "submission models": files.bundles,
    "the confirmation": files.confirmation,
    "recipes": files.recipes,
}
TRIAL_CHECKS: Checks = {
    "running trials": trials.abandoned,
    "trial indices": trials.indices,
    "results": trials.results,
    "artifacts": files.artifacts,
    "kept weights": files.kept_weights,
    "whole weights": files.whole_weights,
    "checkpoints": files.checkpoints,
    "trial folders": files.folders,
    "the disk": files.disk,
    "the images": origin.images,
    "weights": origin.weights,
    "code": origin.code,
    "versions": origin.versions_differ,
}


def run_checks(check: StudyCheck) -> list[Result]:
    """Run all checks; those of trials only if the storage could be read."""
    results = [result for name, run in FILE_CHECKS.items() for result in guarded(check, name, run)]
    if check.study is not None:
        results += [result for name, run in TRIAL_CHECKS.items() for result in guarded(check, name, run)]
    return results
