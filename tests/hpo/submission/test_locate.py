"""A submission model may be named by `best`, by its study, or by its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.errors import HpoError
from hpo.submission.locate import locate_bundle


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three studies, of which `pets` ran last and `birds` before: two models, one, none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STUDIES", "studies")
    for age, (study, models) in enumerate({"pets": ["best", "00003"], "birds": ["best.folds3"], "new": []}.items()):
        for model in models:
            (tmp_path / "studies" / study / "refit" / model).mkdir(parents=True)
            (tmp_path / "studies" / study / "refit" / model / "origin.json").touch()
        (tmp_path / "studies" / study).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "studies" / study / "study.yaml"
        file.write_text(f"name: {study}\n")
        os.utime(file, (1e9 - age, 1e9 - age))
    return tmp_path / "studies"


def ran_last(studies: Path, study: str) -> None:
    os.utime(studies / study / "study.yaml", (2e9, 2e9))


def test_best_is_the_refitted_best_of_the_study_that_ran_last(studies: Path) -> None:
    assert locate_bundle("best") == Path("studies/pets/refit/best")
    ran_last(studies, "birds")
    assert locate_bundle("best") == Path("studies/birds/refit/best.folds3")


def test_a_study_stands_for_its_only_model_by_name_or_folder(studies: Path) -> None:
    expected = Path("studies/birds/refit/best.folds3")
    assert locate_bundle("birds") == expected
    assert locate_bundle("studies/birds") == expected.absolute()
    assert locate_bundle(studies / "birds") == expected.absolute()


def test_a_folder_of_a_model_is_itself_before_any_study(studies: Path) -> None:
    assert locate_bundle("studies/pets/refit/00003") == Path("studies/pets/refit/00003")
    for name in ("best", "birds"):
        (studies.parent / name).mkdir()
        assert locate_bundle(name) != Path(name)
        (studies.parent / name / "origin.json").touch()
        assert locate_bundle(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pets", r"study pets has 2 models; give one of studies/pets/refit/00003, studies/pets/refit/best"),
        ("new", r"study new has no refitted model yet; make one with: hpo refit best --study new"),
        (
            "cats",
            r"cats: no such model; give `best`, a study \(birds, new, pets\), a refitted recipe, or a folder written",
        ),
    ],
)
def test_an_ambiguous_or_missing_model_is_one_line(studies: Path, name: str, message: str) -> None:
    with pytest.raises(HpoError, match=message) as raised:
        locate_bundle(name)
    assert "\n" not in str(raised.value)


def test_best_without_a_refit_names_the_command(studies: Path) -> None:
    ran_last(studies, "new")
    with pytest.raises(HpoError, match="study new has no refitted model yet; make one with: hpo refit best"):
        locate_bundle("best")
    for number in (3, 5):
        (studies / "new" / "refit" / f"best.folds{number}").mkdir(parents=True)
    with pytest.raises(HpoError, match=r"study new has 2 models; give one of .*best\.folds3, .*best\.folds5"):
        locate_bundle("best")


def test_a_confirmation_names_its_search(studies: Path) -> None:
    (studies / "pets.confirm").mkdir()
    (studies / "pets.confirm" / "study.yaml").write_text("name: pets.confirm\n")
    with pytest.raises(HpoError, match=r"study pets\.confirm is a confirmation without models; give pets"):
        locate_bundle("pets.confirm")


def test_without_any_study_best_names_the_first_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "none"))
    with pytest.raises(HpoError, match="begin with: hpo run digits"):
        locate_bundle("best")
