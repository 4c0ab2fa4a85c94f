"""Greedy ensemble selection against a plain one, all ensembles of small libraries, chance, and real refits."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor

from core.config import TrainConfig
from core.data import Dataset, load_dataset, split
from core.loop import train
from core.models import build_model
from hpo.confirmation.result import identity_of
from hpo.confirmation.trials import trainings
from hpo.space import load_recipe
from hpo.study import Study, find_study
from hpo.submission.bundle import load_bundle
from hpo.submission.candidates import Judge
from hpo.submission.decision import ENSEMBLE, ONE, Decision, Forced, decide
from hpo.submission.evidence import Evidence, of_confirmation
from hpo.submission.peers import Library, Peer
from hpo.submission.selection import PARTS, ROUNDS, combined, cross_fitted, decide_selection, select
from tests.hpo.commands import RunHpo
from tests.hpo.digits import check_predictions, write_digits
from tests.hpo.submission.test_length import LEARNS

CPU = torch.device("cpu")
IMAGES = torch.arange(60)


def library_of(seed: int, networks: int) -> tuple[list[Tensor], Tensor]:
    """Logits (60, 3) of networks that share a part of their mistakes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (len(IMAGES),), generator=generator)
    truth = 1.5 * torch.nn.functional.one_hot(labels, 3) + torch.randn(len(labels), 3, generator=generator)
    return [truth + torch.randn(len(labels), 3, generator=generator) for _ in range(networks)], labels


def plain_merit(counts: list[int], library: list[Tensor], labels: Tensor) -> tuple[float, float]:
    """Accuracy, then the log-likelihood, of the mean probabilities, in numpy."""
    shares = np.array(counts) / sum(counts)
    each = np.stack([logits.double().softmax(1).numpy() for logits in library])
    mean = np.tensordot(shares, each, 1)
    truth = labels.numpy()
    right = float(np.mean(mean.argmax(1) == truth))
    return round(right, 12), round(float(np.log(mean[np.arange(len(truth)), truth]).mean()), 12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("most", "fewest"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_a_selection_is_that_of_a_plain_loop_and_nearly_the_best_ensemble(seed: int, most: int, fewest: int) -> None:
    library, labels = library_of(seed, 4)
    found = select(library, Judge(IMAGES, labels, "accuracy").ranking, most, fewest=fewest)

    counts, rounds = [1, 0, 0, 0], [[1, 0, 0, 0]]
    while sum(counts) < ROUNDS:
        tried = [[n + (place == added) for place, n in enumerate(counts)] for added in range(4)]
        tried = [each for each in tried if np.count_nonzero(each) <= most]
        if np.count_nonzero(counts) < fewest:
            tried = [each for each in tried if np.count_nonzero(each) > np.count_nonzero(counts)]
        counts = max(tried, key=lambda each: plain_merit(each, library, labels))
        rounds.append(counts)
    valid = [each for each in rounds if np.count_nonzero(each) >= fewest]
    best = max(valid, key=lambda each: plain_merit(each, library, labels))
    assert list(found) == best

    everything = [
        [1 + others.count(0), *(others.count(place) for place in (1, 2, 3))]
        for size in range(4)
        for others in combinations_with_replacement(range(4), size)
    ]
    allowed = [each for each in everything if fewest <= np.count_nonzero(each) <= most]
    highest = max(plain_merit(each, library, labels)[0] for each in allowed)
    assert plain_merit(list(found), library, labels)[0] >= highest - 2 / 60, "within two images of all small ensembles"
    if most == 1:
        assert found == (1, 0, 0, 0)
    elif fewest == 1:
        assert plain_merit(list(found), library, labels) >= plain_merit([1, 0, 0, 0], library, labels)


def test_an_ensemble_is_the_weighted_mean_of_probabilities() -> None:
    library, _ = library_of(0, 3)
    expected = (3 * library[0].softmax(1) + library[2].softmax(1)) / 4
    torch.testing.assert_close(combined(library, (3, 0, 1)).exp(), expected)


def test_no_image_is_predicted_by_a_selection_that_saw_it() -> None:
    """Repeated predictions of an image are on one side."""
    library, labels = library_of(1, 3)
    images = IMAGES.repeat(2)
    twice = [logits.repeat(2, 1) for logits in library]
    judge = Judge(images, labels.repeat(2), "accuracy")
    parts = cross_fitted(twice, images, judge.ranking, 2)
    assert len(parts) == PARTS
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(120))
    for rows, counts in parts:
        own = set(images[rows].tolist())
        others = torch.tensor([row for row, image in enumerate(images.tolist()) if image not in own])
        assert len(others) == 120 - 2 * len(own)
        assert counts == select([logits[others] for logits in twice], Judge(
            images[others], judge.labels[others], "accuracy").ranking, 2)  # fmt: skip


# The decision -------------------------------------------------------------------------------------------------------


def evidence_of(logits: Tensor, labels: Tensor, **views: Tensor) -> Evidence:
    return Evidence(torch.arange(len(labels)), labels, {"own": {"none": logits, **views}}, "validation", ((),))


def decided(library: list[Tensor], labels: Tensor, *, most: int = 3, form: str | None = None) -> Decision:
    """The decision between the first of a library and an ensemble."""
    own, *others = (evidence_of(logits, labels) for logits in library)
    peers = tuple(Peer(f"trial {n}", n, TrainConfig(), 5, each) for n, each in enumerate(others, 1))
    return decide_selection(decide(own, "accuracy"), own, Library(peers, most), "accuracy", form)


def test_an_ensemble_of_equal_networks_is_taken_in_one_of_twenty_at_most() -> None:
    """All are sure of their answers, which are wrong as often, so that the mean of two is not better than one."""
    generator, taken, studies = torch.Generator().manual_seed(0), 0, 60
    for _ in range(studies):
        labels = torch.randint(10, (200,), generator=generator)
        wrong = torch.rand(4, 200, generator=generator) < 0.2
        answers = torch.where(wrong, torch.randint(10, (4, 200), generator=generator), labels)
        sure = 12 + torch.randn(4, 200, 1, generator=generator)
        taken += decided(list(sure * torch.nn.functional.one_hot(answers, 10)), labels, most=2).form == ENSEMBLE
    assert taken <= 0.05 * studies


def test_an_ensemble_beyond_chance_is_taken_and_judged_on_images_that_it_was_not_selected_on() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    truth = 1.5 * torch.nn.functional.one_hot(labels, 3)
    library = [truth + torch.randn(600, 3, generator=generator) for _ in range(3)]
    found = decided(library, labels)
    assert found.form == ENSEMBLE
    assert [each.name for each in found.selection] == ["the winner", "trial 1", "trial 2"]
    assert sum(each.weight for each in found.selection) == pytest.approx(1)
    one, several = (each for each in found.candidates if each.step == "selection")
    assert (one.name, several.name, several.taken, several.passes) == (ONE, ENSEMBLE, True, 3)
    parts = cross_fitted(library, torch.arange(600), Judge(torch.arange(600), labels, "accuracy").ranking, 3)
    right = 0
    for rows, counts in parts:
        mean = sum(count * logits[rows].softmax(1) for logits, count in zip(library, counts, strict=True))
        assert isinstance(mean, Tensor)
        right += int((mean.argmax(1) == labels[rows]).sum())
    assert several.score == pytest.approx(right / 600)
    assert found.temperature.before.accuracy == pytest.approx(right / 600), "the temperature is that of the ensemble"
    assert len(decided(library, labels, most=2).selection) == 2


def test_a_form_that_is_asked_for_is_taken() -> None:
    labels = torch.arange(60) % 3
    right = 3.0 * torch.nn.functional.one_hot(labels, 3)
    library = [right, -right, -right]
    alone = decided(library, labels)
    assert (alone.form, alone.selection) == (ONE, ())
    assert [each.name for each in alone.candidates if each.step == "selection"] == [ONE]
    forced = decided(library, labels, form=ENSEMBLE)
    assert forced.form == ENSEMBLE
    assert len(forced.selection) == 2
    assert decided(library_of(0, 4)[0], library_of(0, 4)[1], form=ONE).selection == ()


def test_a_peer_has_the_winners_views_where_it_predicted_them() -> None:
    library, labels = library_of(3, 3)
    winner = evidence_of(library[0], labels, flip=library[0] + 0.1)
    seen, unseen = evidence_of(library[1], labels, flip=library[1]), evidence_of(library[2], labels)
    peers = (Peer("trial 1", 1, TrainConfig(), 5, seen), Peer("trial 2", 2, TrainConfig(), 5, unseen))
    decision = decide(winner, "accuracy", Forced(views="flip"))
    found = decide_selection(decision, winner, Library(peers, 3), "accuracy", ENSEMBLE)
    views = {each.name: each.views for each in found.selection}
    assert views.items() <= {"the winner": "flip", "trial 1": "flip", "trial 2": "none"}.items()
    assert len(views) > 1


# Refits -------------------------------------------------------------------------------------------------------------


def check_bundle(folder: Path, study: Study, digits: Dataset) -> list[str]:
    """The model predicts the weighted mean of its networks, each trained as its trial; return their names."""
    report = json.loads((folder / "metrics.json").read_text())
    chosen, temperature = report["decision"]["selection"], report["temperature"]["value"]
    test = load_dataset(TrainConfig().override({"data.name": "digits"}).data).open_test()
    total = torch.zeros(len(test.labels), 10)
    for place, each in enumerate(chosen, 1):
        config = load_recipe(folder / ("config.yaml" if place == 1 else f"config_{place}.yaml")).config
        whole = split(digits, config.data).whole()
        if each["trial"] is not None and each["average"] == "own":
            searched = study.trained(each["trial"]).config
            if report["length"] is not None and place == 1:  # of the ladder's first replicate
                drawn = {"data.split_seed": config.data.split_seed, "data.val_part": config.data.val_part}
                searched = searched.override({"epochs": config.epochs, "seed": config.seed, **drawn})
            assert config == searched
            trained = train(config, whole, device=CPU, stop_after=each["epochs"]).model.state_dict()
            kept = load_file(folder / f"member_{place}.safetensors")
            assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())
        model = build_model(config.model, num_classes=10, in_channels=1, image_size=(8, 8)).eval()
        load_model(model, folder / f"member_{place}.safetensors")
        assert each["views"] == "none"
        with torch.inference_mode():
            pixels = (test.images / 255 - whole.mean[0]) / whole.std[0]
            total += each["weight"] * model(pixels).softmax(1)
    bundle = load_bundle(folder, CPU)
    expected = (total.log() / temperature).softmax(1)
    torch.testing.assert_close(bundle.probabilities(test.images), expected, rtol=1e-4, atol=1e-5)
    accuracy = float((expected.argmax(1) == test.labels).float().mean())
    assert report["test"]["with_tta"]["accuracy"] == pytest.approx(accuracy)
    assert report["networks"] == len(chosen) == len(bundle.models)
    return [each["name"] for each in chosen]


def test_kept_trials_become_one_model(study: Study, digits: Dataset, run_hpo: RunHpo, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    options = ["--ensemble", "3", "--form", "ensemble", "--average", "own", "--views", "none", "--onnx"]
    said = run_hpo("refit", "best", "--no-confirm", *options)
    folder = study.paths.refit("best.ensemble3")
    names = check_bundle(folder, study, digits)
    best = study.best_trial()
    assert best is not None
    assert names[0] == f"trial {best.number}"
    assert 2 <= len(names) <= 3
    assert set(names) <= {"trial 0", "trial 1", "trial 2"}
    assert "the ensemble: " in said
    assert "ONNX: its probabilities differ from torch's by at most" in said
    card = (folder / "README.md").read_text()
    assert all(f"| {name} |" in card for name in names)
    labels = tmp_path / "labels.csv"
    run_hpo("predict", str(folder), str(write_digits(tmp_path / "some", 3)), "-o", str(labels), "--probabilities")
    check_predictions(labels, 3)


def test_finalists_of_a_confirmation_become_one_model(study: Study, digits: Dataset, run_hpo: RunHpo) -> None:
    run_hpo("confirm", "own")
    options = ["--epochs", "2", "--ensemble", "3", "--form", "ensemble", "--views", "none"]
    run_hpo("refit", "best", *options)
    folder = study.paths.refit("best.ensemble3")
    names = check_bundle(folder, study, digits)
    confirmation = json.loads(study.paths.confirmation.read_text())
    contenders = {"the baseline (trial 0)", *(one["key"] for one in confirmation["contenders"])}
    assert set(names[1:]) <= contenders
    report = json.loads((folder / "metrics.json").read_text())
    assert report["decision"]["selection"][1]["epochs"] == 2
    replicates = report["decision"]["networks"] // len(confirmation["contenders"])
    assert report["decision"]["networks"] == replicates * len(confirmation["contenders"]) > 2


def test_a_winner_that_its_ladder_made_longer_is_combined_with_finalists_of_one_replicate(
    tmp_path: Path, digits: Dataset, run_hpo: RunHpo
) -> None:
    (tmp_path / "own.yaml").write_text(LEARNS)
    run_hpo("run", str(tmp_path / "own.yaml"), "--trials", "2")
    run_hpo("refit", "best", "--ensemble", "2", "--form", "ensemble", "--average", "own", "--views", "none")
    study = find_study("own")
    folder = study.paths.refit("best.ensemble2")
    assert len(check_bundle(folder, study, digits)) == 2
    report = json.loads((folder / "metrics.json").read_text())
    assert report["length"]["epochs"] == 4
    assert report["epochs"] == [each["epochs"] for each in report["decision"]["selection"]] == [4, 1]
    assert report["decision"]["networks"] == 2


def test_predictions_of_the_same_images_are_those_of_all_replicates_or_of_one(
    study: Study, digits: Dataset, run_hpo: RunHpo
) -> None:
    run_hpo("confirm", "own")
    identity = identity_of(json.loads(study.paths.confirmation.read_text())["contenders"][0]["config"])
    whole = of_confirmation(study, identity, digits.labels)
    assert whole is not None
    confirming = find_study("own.confirm")
    numbers = [each.number for each in trainings(confirming) if each.identity == identity]
    before, val = (split(digits, confirming.trained(number).config.data).val for number in numbers[:2])
    second = slice(len(before), len(before) + len(val))
    one = of_confirmation(study, identity, digits.labels, val)
    again = of_confirmation(study, identity, digits.labels, whole.images)
    assert one is not None
    assert again is not None
    assert (one.networks, again.networks) == (1, whole.networks)
    assert torch.equal(one.logits["own"]["none"], whole.logits["own"]["none"][second])
    assert of_confirmation(study, identity, digits.labels, whole.images[:5]) is None


def test_a_winner_without_peers_is_one_line(study: Study, run_hpo: RunHpo) -> None:
    assert "--ensemble: a recipe has no other configurations" in run_hpo.fails(
        "refit", "digits_base", "--ensemble", "2"
    )
    best = study.best_trial()
    assert best is not None
    without, broken = (study.paths.trial_validation(number) for number in {0, 1, 2} - {best.number})
    without.unlink()
    outputs = load_file(broken)
    outputs["logits"][0, 0] = float("nan")
    save_file(outputs, broken)
    said = run_hpo.fails("refit", "best", "--no-confirm", "--ensemble", "2")
    assert "is alone, no other trial has predictions of its validation images on this machine" in said


def test_without_an_ensemble_and_with_single_one_network_is_trained(study: Study, run_hpo: RunHpo) -> None:
    run_hpo("refit", "best", "--no-confirm", "--single", "--average", "own")
    folder = study.paths.refit("best")
    assert json.loads((folder / "origin.json").read_text())["format"] == 4
    assert json.loads((folder / "metrics.json").read_text())["decision"]["selection"] is None
    assert (folder / "model.safetensors").exists()
