"""Find a submission model by `best`, by its study or recipe, or by its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpo.errors import BundleError, StudyError
from hpo.paths import StudyPaths, confirmed_by, is_confirmation, recipe_refits, studies_root
from hpo.study import last_search

BEST = "best"


def locate_bundle(name: Path | str) -> Path:
    """Return the folder of a submission model.

    Args:
        name: A folder written by `hpo refit`; the folder or name of a study with one such folder; the name of a recipe
            that was refitted once; or `best`, the refitted best trial of the study that ran last.

    Raises:
        BundleError: There is no such study or model, or several models have the name.
        StudyError: There is no study for `best`.
    """
    path = Path(name).expanduser()
    if StudyPaths(path).study_yaml.is_file():
        return _of_study(StudyPaths(path.resolve()))
    if _is_bundle(path) or len(path.parts) != 1:
        return path
    if str(name) == BEST:
        return _best()
    study, of_recipe = StudyPaths.of(str(name)), recipe_refits(str(name))
    is_study = study.study_yaml.is_file()
    if of_recipe and not (is_study and study.refits()):
        return _only(f"recipe {name}", of_recipe)
    if is_study:
        return _of_study(study, of_recipe)
    if path.is_dir():
        return path
    known = sorted(file.parent.name for file in studies_root().glob("*/study.yaml"))
    there = f"a study ({', '.join(known)})" if known else f"a study (there is none in {studies_root()})"
    raise BundleError(
        f"{name}: no such model; give `{BEST}`, {there}, a refitted recipe, or a folder written by hpo refit"
    )


def _is_bundle(path: Path) -> bool:
    return (path / "origin.json").is_file()


def _best() -> Path:
    """The refitted best trial of the study that ran last: one network, or the only ensemble."""
    study = StudyPaths.of(last_search())
    refits = [folder for folder in study.refits() if folder.name.partition(".")[0] == BEST]
    single = study.refit(BEST)
    if single in refits:
        return single
    return _only(f"study {study.name}", refits, f"hpo refit {BEST}")


def _of_study(study: StudyPaths, of_recipe: Sequence[Path] = ()) -> Path:
    """The model of a study; a recipe of the same name may have been refitted too."""
    if is_confirmation(study.name):
        raise StudyError(f"study {study.name} is a confirmation without models; give {confirmed_by(study.name)}")
    refits = [*study.refits(), *of_recipe]
    return _only(f"study {study.name}", refits, f"hpo refit {BEST} --study {study.name}")


def _only(owner: str, refits: Sequence[Path], command: str = "") -> Path:
    """The single folder of several; `command` writes one where there is none."""
    if not refits:
        raise BundleError(f"{owner} has no refitted model yet; make one with: {command}")
    if len(refits) > 1:
        raise BundleError(f"{owner} has {len(refits)} models; give one of {', '.join(map(str, refits))}")
    return refits[0]
