"""Probes: logistic regressions on the features of a frozen network."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from core.config import DataConfig, TrainConfig
from core.data import Splits, folds, load_dataset, on_device
from core.errors import CheckpointError, ConfigError
from core.loop import Execution, TrainResult, probe, seconds_per_epoch, train
from core.loop.probe import FOLDS, PENALTIES, Features, Fitted, fit
from core.loop.profile import profile
from core.loop.run import Probe, Run
from core.models import build_model, probed_classifier
from core.runtime import normalize
from core.tta import predict_logits
from tests.core.networks import build, images
from tests.core.trainings import CPU

Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    probe._memory.clear()
    yield
    probe._memory.clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of drawn weights, whose features are as good as any for these tests."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    network = timm.create_model("test_resnet", pretrained=False, num_classes=1000, in_chans=1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):  # as if it had been trained
            buffer.uniform_(-0.2, 0.2)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def config(weights: Path) -> TrainConfig:
    return TrainConfig().override(
        {
            "optim.name": "logistic",
            "model.name": "timm/test_resnet",
            "model.pretrained": True,
            "model.pretrained_file": str(weights),
        }
    )


@pytest.fixture(scope="module")
def result(config: TrainConfig, digits: Splits) -> TrainResult:
    return train(config, digits, device=CPU)


def clusters(classes: int, size: int = 30, features: int = 6, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Overlapping clusters, whose features differ in scale and one of which is constant."""
    draw = np.random.default_rng(seed)
    labels = np.arange(classes).repeat(size)
    points = draw.normal(size=(classes, features))[labels] + draw.normal(size=(len(labels), features))
    points = points * 10.0 ** (np.arange(features) % 5) + 5
    return np.concatenate([points, np.ones((len(labels), 1))], 1).astype(np.float32), labels


def fitted(x: Floats, y: NDArray[np.int64], weights: Any = None, together: Any = None) -> Fitted:
    weights = np.ones(y.max() + 1) if weights is None else weights
    return fit(x, y, together, class_weights=weights, seed=0)


def probabilities(found: Fitted, x: Floats) -> NDArray[np.float64]:
    return torch.from_numpy(x @ found.weight.T + found.bias).softmax(1).numpy()


# The regression


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_a_regression_of_scikit_learn_on_standardized_features(classes: int) -> None:
    x, y = clusters(classes)
    found = fitted(x, y)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=found.penalty, max_iter=1000)).fit(x, y)
    assert np.abs(probabilities(found, x) - plain.predict_proba(x)).max() < 2e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_has_the_least_held_out_loss_of_all(seed: int) -> None:
    x, y = clusters(4, seed=seed)
    parts = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(x, y))
    standard = StandardScaler().fit_transform(x)

    def held_out(penalty: float) -> float:
        model = LogisticRegression(C=penalty, max_iter=1000)
        fits = [(model.fit(standard[a], y[a]).predict_proba(standard[b]), y[b]) for a, b in parts]
        return sum(log_loss(truth, p, normalize=False, labels=range(4)) for p, truth in fits)

    losses = [held_out(penalty) for penalty in PENALTIES]
    assert fitted(x, y).penalty == PENALTIES[int(np.argmin(losses))]
    assert 0 < np.argmin(losses) < len(PENALTIES) - 1


def test_class_weights_count_in_the_fit(digits: Splits, config: TrainConfig) -> None:
    x, y = clusters(3)
    few = np.concatenate([np.flatnonzero(y < 2), np.flatnonzero(y == 2)[:6]])
    weights = np.array([0.5, 0.5, 2.0])
    found = fitted(x[few], y[few], weights)
    plain = make_pipeline(
        StandardScaler(), LogisticRegression(C=found.penalty, max_iter=1000, class_weight=dict(enumerate(weights)))
    ).fit(x[few], y[few])
    assert np.abs(probabilities(found, x) - plain.predict_proba(x)).max() < 2e-3

    rare = replace(digits, train=digits.train[(digits.labels[:192] > 4) | (torch.arange(192) < 40)])
    weighted = train(config.override({"loss.class_weights": "inverse"}), rare, device=CPU)
    assert not torch.equal(weighted.val_logits, train(config, rare, device=CPU).val_logits)


def test_images_kept_together_are_never_on_both_sides() -> None:
    _, y = clusters(3, 40)
    together = np.arange(len(y)) // 4 * 7
    parts = list(probe._parts(y, together, seed=0))
    assert len(parts) == FOLDS
    for train_rows, held_out in parts:
        assert not set(together[train_rows]) & set(together[held_out])
    assert sorted(row for _, held_out in parts for row in held_out) == list(range(len(y)))


def test_copies_do_not_loosen_the_penalty() -> None:
    """With each wrongly labelled image four times, ordinary cross-validation finds that hardly a penalty is best."""
    x, y = clusters(4, 15, features=40, seed=1)
    y[::3] = np.roll(y[::3], 7)
    again = np.arange(len(y)).repeat(4)
    assert fitted(x[again], y[again], together=again).penalty < fitted(x[again], y[again]).penalty / 5


def test_a_class_of_one_image_is_fitted() -> None:
    x, y = clusters(3)
    few = np.concatenate([np.flatnonzero(y < 2), np.flatnonzero(y == 2)[:1]])
    assert probabilities(fitted(x[few], y[few]), x[few[-1:]]).shape == (1, 3)
    alone = fitted(x[[0, 30, 60]], y[[0, 30, 60]])
    assert alone.penalty == probe.UNTESTED_PENALTY


def test_a_class_without_images_is_an_error() -> None:
    x, y = clusters(3)
    with pytest.raises(ConfigError, match="every class, and class 3 has none"):
        fitted(x, y, np.ones(4))


# The network


def test_the_result_is_the_pretrained_network_with_another_classifier(
    result: TrainResult, config: TrainConfig, digits: Splits
) -> None:
    pretrained = build_model(config.model, num_classes=10, in_channels=1, image_size=(8, 8))
    before, after = pretrained.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"fc.weight", "fc.bias"}
    assert not any(module.training for module in result.model.modules())


def test_its_validation_logits_are_those_of_the_network(result: TrainResult, digits: Splits) -> None:
    logits = predict_logits(
        result.model, digits.images[digits.val], prepare=lambda x: normalize(x, digits.mean, digits.std)
    )
    assert result.val_logits is not None
    assert torch.allclose(logits, result.val_logits, atol=1e-4)
    assert result.kept.raw is not None
    right = (logits.argmax(1) == digits.labels[digits.val]).float().mean().item()
    assert result.kept.raw.accuracy == pytest.approx(right)
    assert right > 0.7


@pytest.mark.parametrize("epochs", [1, 30])
def test_it_has_one_epoch(config: TrainConfig, digits: Splits, epochs: int, result: TrainResult) -> None:
    ended = []
    found = train(config.override({"epochs": epochs}), digits, device=CPU, on_epoch_end=ended.append)
    assert [epoch.epoch for epoch in found.history] == [1]
    assert ended == [found.kept]
    assert found.kept.images == 192
    assert found.kept.step > 1
    assert found.kept.train_loss < found.kept.raw.loss
    assert torch.equal(found.val_logits, result.val_logits)


def test_fields_of_a_training_have_no_effect(config: TrainConfig, digits: Splits, result: TrainResult) -> None:
    other = {"batch_size": 7, "optim.lr": 3.0, "averaging.name": "ema", "augment.ops": 2, "model.dropout": 0.5}
    more = {"early_stop.patience_fraction": 0.1, "schedule.name": "step", "sampling.name": "balanced"}
    assert torch.equal(train(config.override({**other, **more}), digits, device=CPU).val_logits, result.val_logits)


def test_without_validation_images_it_classifies_the_training_images(config: TrainConfig, digits: Splits) -> None:
    found = train(config, replace(digits, val=digits.val[:0]), device=CPU)
    assert found.val_logits is None
    assert not found.kept.validated
    assert found.kept.train_loss < 0.5


def test_streamed_images_have_the_same_features(config: TrainConfig, digits: Splits, result: TrainResult) -> None:
    found = train(config, digits, device=CPU, execution=Execution(streamed=True))
    assert torch.equal(found.val_logits, result.val_logits)


def test_batches_that_do_not_fit_the_memory_are_halved(
    config: TrainConfig, digits: Splits, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = timm.models.resnet.ResNet.forward

    def limited(model: Any, images: Tensor) -> Tensor:
        if len(images) > 100:
            raise torch.OutOfMemoryError("too many images")
        return forward(model, images)

    monkeypatch.setattr(timm.models.resnet.ResNet, "forward", limited)
    found = train(config, digits, device=CPU, execution=Execution(probe=True))
    assert torch.allclose(found.val_logits, result.val_logits, atol=1e-2)


def test_bf16_is_used_for_the_features(config: TrainConfig, digits: Splits, result: TrainResult) -> None:
    found = train(config.override({"precision.autocast": "bf16"}), digits, device=CPU)
    assert not torch.equal(found.val_logits, result.val_logits)
    assert (found.val_logits.argmax(1) == result.val_logits.argmax(1)).float().mean() > 0.8


# Interruptions


@pytest.mark.parametrize("how", ["interrupted", "at the end"])
def test_a_checkpoint_after_its_epoch_ends_it_without_another_fit(
    how: str, config: TrainConfig, digits: Splits, result: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"

    def interrupt(_: object) -> None:
        if how == "interrupted":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if how == "interrupted" else ZeroDivisionError):
        train(config, digits, device=CPU, on_epoch_end=interrupt, checkpoint_to=checkpoint, checkpoint_at_end=True)
        raise ZeroDivisionError
    monkeypatch.setattr(Run, "logits", None)
    monkeypatch.setattr(Probe, "epoch", None)
    resumed: list[Any] = []
    again = train(config, digits, device=CPU, resume_from=checkpoint, on_resume=resumed.append)
    assert torch.equal(again.val_logits, result.val_logits)
    assert all(map(torch.equal, again.model.state_dict().values(), result.model.state_dict().values()))
    assert [epoch.epoch for epoch in resumed[0]] == [1]
    with pytest.raises(CheckpointError, match="another configuration"):
        train(config.override({"seed": 1}), digits, device=CPU, resume_from=checkpoint)


# Features


@pytest.fixture
def one_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits the classifier once, where only its features are tested."""
    monkeypatch.setattr(probe, "PENALTIES", (1.0,))


class Passes:
    """Counts the images that go through a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self._of = 0, Features.of
        monkeypatch.setattr(Features, "of", lambda features, images: self.count(features, images))

    def count(self, features: Features, images: Tensor) -> Tensor:
        self.images += len(images)
        return self._of(features, images)


@pytest.mark.usefixtures("one_penalty")
def test_features_are_computed_once_for_all_folds_and_seeds(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(name="digits", folds=3, normalize="half")
    dataset = load_dataset(data)
    passes = Passes(monkeypatch)
    for seed in (0, 1):
        divided = on_device(folds(dataset, data.model_copy(update={"split_seed": seed})), CPU)
        for split in divided:
            train(config.override({"seed": seed}), split, device=CPU)
    assert passes.images == len(dataset.labels)


@pytest.mark.usefixtures("one_penalty")
@pytest.mark.parametrize("other", ["images", "normalization", "input size", "precision", "weights"])
def test_features_are_computed_again_for_other(
    other: str, config: TrainConfig, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, digits, device=CPU)
    passes = Passes(monkeypatch)
    train(config, replace(digits), device=CPU)
    assert passes.images == 0
    changed = digits
    if other == "images":
        changed = replace(digits, images=digits.images.clone())
    elif other == "normalization":
        changed = replace(digits, mean=(0.5,))
    elif other == "input size":
        config = config.override({"model.input_size": 16})
    elif other == "precision":
        config = config.override({"precision.autocast": "bf16"})
    else:
        network = timm.create_model("test_resnet", pretrained=False, num_classes=1000, in_chans=1)
        save_file(network.state_dict(), config.model.pretrained_file)
    train(config, changed, device=CPU)
    assert passes.images == len(digits.images)


@pytest.mark.usefixtures("one_penalty")
def test_features_of_unused_images_are_not_computed(
    config: TrainConfig, digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    monkeypatch.setattr("core.tta.EVALUATION_BATCH", 32)
    few = replace(digits, train=digits.train[:64], val=digits.val[:10])
    train(config, few, device=CPU)
    assert passes.images == 64 + 32
    train(config, digits, device=CPU)
    assert passes.images == len(digits.images)


@pytest.mark.usefixtures("one_penalty")
def test_features_are_forgotten_with_their_images_and_beyond_a_few_networks(
    config: TrainConfig, digits: Splits
) -> None:
    gone = replace(digits, images=digits.images.clone())
    train(config, gone, device=CPU)
    del gone
    gc.collect()
    for mean in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        train(config, replace(digits, mean=(mean,)), device=CPU)
    assert len(probe._memory) == probe.REMEMBERED
    assert all(known.images() is digits.images for known in probe._memory)


@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_the_features_are_those_before_timms_classifier(name: str) -> None:
    model = build(name=f"timm/{name}", in_channels=3, image_size=(64, 64))
    batch = images(2, 3, 64, 64)
    found = Features(model, name, torch.no_grad).of(batch)
    assert model.training
    with torch.no_grad():
        model.eval()
        wanted = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert torch.equal(found, wanted)


# Refusals


@pytest.mark.parametrize("name", ["timm/deit_tiny_distilled_patch16_224", "timm/levit_128s"])
def test_a_network_without_one_linear_classifier_is_refused(name: str) -> None:
    model = build(name=name, in_channels=3, image_size=(224, 224))
    with pytest.raises(ConfigError, match="ends in one linear layer"):
        probed_classifier(model)


@pytest.mark.parametrize("name", ["resnet", "timm/test_resnet"])
def test_features_of_an_untrained_network_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"set model\.pretrained"):
        TrainConfig().override({"optim.name": "logistic", "model.name": name})


def test_it_has_no_steps_to_profile(config: TrainConfig, digits: Splits) -> None:
    with pytest.raises(ConfigError, match="leave out --profile"):
        profile(config, digits, device=CPU)


def test_its_time_is_estimated_for_all_its_epochs_together(
    config: TrainConfig, digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "seconds", lambda _: 12.0)
    assert seconds_per_epoch(config.override({"epochs": 4}), digits, device=CPU) == 3.0
    monkeypatch.undo()
    assert 0 < seconds_per_epoch(config.override({"epochs": 1}), digits, device=CPU) < 60
