"""`core.loop.train` on real digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import core.loop.run
from core.calibration import calibrated_loss
from core.checkpoint import load_checkpoint
from core.config import TrainConfig
from core.data import Splits
from core.errors import CheckpointError, ConfigError, DivergedError
from core.loop import EpochMetrics, seconds_per_epoch, train
from core.loop.run import Run
from core.loop.step import batch_sizes
from core.metrics import Scores
from core.schedule import reductions, saturated_from
from tests.core.conftest import Train
from tests.core.trainings import CPU, STATEFUL, same


def test_the_network_learns_digits(digits: Splits, tiny: TrainConfig) -> None:
    able = {"epochs": 25, "model.widths": (16, 32), "batch_size": 16, "augment.crop_pad_fraction": 0.0}
    result = train(tiny.override(able), digits, device=CPU)
    assert result.value("accuracy") > 0.6  # 192 images of ten classes
    assert result.history[-1].train_loss < 0.7 * result.history[0].train_loss


@pytest.mark.parametrize("case", STATEFUL)
def test_the_same_seed_gives_bitwise_the_same_training(digits: Splits, trained: Train, case: str) -> None:
    first = trained(case)
    torch.manual_seed(2)  # other use of torch's global generator
    assert same(first, train(trained.config(case), digits, device=CPU))


@pytest.mark.parametrize("case", STATEFUL)
def test_a_resumed_training_equals_the_uninterrupted_one_bitwise(
    digits: Splits, trained: Train, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", float("inf"))
    config = trained.config(case)

    def stop_in_the_third(epoch: EpochMetrics) -> None:
        if epoch.epoch == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "trial.pt"
    with pytest.raises(KeyboardInterrupt):
        train(config, digits, device=CPU, on_epoch_end=stop_in_the_third, checkpoint_to=checkpoint)
    told: list[int] = []
    resumed_epochs: list[int] = []
    resumed = train(
        config,
        digits,
        device=CPU,
        resume_from=checkpoint,
        on_resume=lambda history: told.extend(epoch.epoch for epoch in history),
        on_epoch_end=lambda epoch: resumed_epochs.append(epoch.epoch),
    )
    uninterrupted = trained(case)
    assert told == [1, 2, 3]
    assert resumed_epochs == [epoch.epoch for epoch in uninterrupted.history[3:]]
    assert same(uninterrupted, resumed)


@pytest.fixture
def _rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save only the first epoch's and requested checkpoints."""
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", 1e-9)


@pytest.mark.usefixtures("_rarely")
def test_checkpoints_are_saved_at_given_epochs_and_reported(digits: Splits, tiny: TrainConfig, tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "trial.pt"
    train(
        tiny.override({"epochs": 6}),
        digits,
        device=CPU,
        checkpoint_to=path,
        checkpoint_at={3, 5},
        checkpoint_at_end=True,
        on_epoch_end=lambda epoch: told.append(f"epoch {epoch.epoch}"),
        on_checkpoint=lambda saved: told.append(f"saved {len(load_checkpoint(saved, CPU)['history'])}"),
    )
    assert " ".join(told) == "epoch 1 saved 1 epoch 2 epoch 3 saved 3 epoch 4 epoch 5 saved 5 epoch 6 saved 6"


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_the_given_epochs_have_the_calibrated_loss_of_the_counted_predictions(
    digits: Splits, tiny: TrainConfig, averaging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[Scores, torch.Tensor]] = []
    score = Run._score

    def recorded(run: Run, model: torch.nn.Module) -> Scores:
        found = score(run, model)
        if model is not run.model and not run.history:  # the first average is behind the weights
            found = dataclasses.replace(found, accuracy=-1.0)
        assert run.last_logits is not None
        scored.append((found, run.last_logits))
        return found

    monkeypatch.setattr(Run, "_score", recorded)
    config = tiny.override({"averaging.name": averaging, "epochs": 6})
    result = train(config, digits, device=CPU, calibrate_at={1, 3, 6})
    labels = digits.labels[digits.val]
    for epoch in result.history:
        logits = next(logits for scores, logits in scored if scores is epoch.counted())
        assert epoch.calibrated_loss == (calibrated_loss(logits, labels) if epoch.epoch in (1, 3, 6) else None)
    averaged = [epoch.counted() is epoch.averaged for epoch in result.history]
    assert averaged == [False, *[averaging == "ema"] * 5]


def test_a_resumed_training_has_the_calibrated_losses_of_its_checkpoint(
    digits: Splits, tiny: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "trial.pt"
    train(tiny, digits, device=CPU, stop_after=2, checkpoint_to=path, checkpoint_at_end=True, calibrate_at={1})
    seen: list[float | None] = []
    train(
        tiny,
        digits,
        device=CPU,
        resume_from=path,
        calibrate_at={1},
        on_resume=lambda history: seen.extend(epoch.calibrated_loss for epoch in history),
    )
    whole = train(tiny, digits, device=CPU, calibrate_at={1})
    assert seen == [epoch.calibrated_loss for epoch in whole.history[:2]]
    assert (seen[0] is None, seen[1]) == (False, None)


@pytest.mark.usefixtures("_rarely")
@pytest.mark.parametrize(("raised", "left"), [(KeyboardInterrupt, 3), (ArithmeticError, 1)])
def test_an_interrupted_epoch_is_saved_and_a_pruned_one_is_not(
    digits: Splits, tiny: TrainConfig, tmp_path: Path, raised: type[BaseException], left: int
) -> None:
    def stop_in_the_third(epoch: EpochMetrics) -> None:
        if epoch.epoch == 3:
            raise raised

    path = tmp_path / "trial.pt"
    saved: list[Path] = []
    with pytest.raises(raised):
        train(
            tiny,
            digits,
            device=CPU,
            checkpoint_to=path,
            checkpoint_at=[3],
            on_epoch_end=stop_in_the_third,
            on_checkpoint=saved.append,
        )
    assert len(load_checkpoint(path, CPU)["history"]) == left
    assert set(saved) == {path}


def test_a_checkpoint_of_another_training_is_refused(digits: Splits, tiny: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "trial.pt"
    train(tiny, digits, device=CPU, checkpoint_to=path, stop_after=1)
    fewer = dataclasses.replace(digits, classes=digits.classes[:9], labels=digits.labels.clamp(max=8))
    swapped = dataclasses.replace(digits, train=digits.train.flip(0))
    for other in (fewer, swapped):
        with pytest.raises(CheckpointError, match=r"trial\.pt: belongs to another data set or split of it; delete it"):
            train(tiny, other, device=CPU, resume_from=path)
    with pytest.raises(CheckpointError, match=r"trial\.pt: belongs to another metric; delete it"):
        train(tiny, digits, device=CPU, resume_from=path, metric="nll")
    with pytest.raises(CheckpointError, match=r"trial\.pt: belongs to another configuration"):
        train(tiny.override({"optim.weight_decay": 1e-3}), digits, device=CPU, resume_from=path)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint"):
            train(tiny, digits, device=CPU, resume_from=path)


def test_the_callers_generators_are_restored(digits: Splits, tiny: TrainConfig) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(tiny.override({"model.dropout": 0.5}), digits, device=CPU)
    assert torch.equal(torch.rand(3), expected)


def test_stop_after_keeps_the_schedule_of_the_whole_run(digits: Splits, tiny: TrainConfig) -> None:
    whole = train(tiny, digits, device=CPU)
    part = train(tiny, digits, device=CPU, stop_after=2)
    assert [epoch.train_loss for epoch in part.history] == [epoch.train_loss for epoch in whole.history[:2]]
    assert part.history[1].lr == whole.history[1].lr


def test_training_without_validation_images_keeps_the_last_weights(digits: Splits, tiny: TrainConfig) -> None:
    no_val = dataclasses.replace(digits, val=torch.empty(0, dtype=torch.int64))
    result = train(tiny.override({"averaging.name": "ema"}), no_val, device=CPU)
    assert result.val_logits is None
    assert result.kept.epoch == tiny.epochs
    with pytest.raises(ValueError, match="no validation images"):
        result.value("accuracy")


def test_a_nan_loss_raises_divergederror(digits: Splits, tiny: TrainConfig) -> None:
    without_contrast = dataclasses.replace(digits, std=(1e-42,))  # overflows normalized pixels
    with pytest.raises(DivergedError, match="training loss of epoch 1 is nan"):
        train(tiny, without_contrast, device=CPU)


def test_the_kept_network_has_the_reported_score(digits: Splits, tiny: TrainConfig) -> None:
    for averaging in ("none", "ema", "swa"):
        result = train(tiny.override({"averaging.name": averaging}), digits, device=CPU)
        assert result.val_logits is not None
        hits = (result.val_logits.argmax(1) == digits.labels[digits.val]).float().mean().item()
        assert hits == pytest.approx(result.value("accuracy"))


def test_early_stopping_ends_the_run_and_keeps_its_best_epoch(digits: Splits, tiny: TrainConfig) -> None:
    config = tiny.override({"epochs": 12, "optim.lr_scale": 1e-6, "early_stop.patience_fraction": 0.25})
    result = train(config, digits, device=CPU)
    best = max(result.history, key=lambda epoch: epoch.score("accuracy"))
    assert result.kept.score("accuracy") == best.score("accuracy")
    assert len(result.history) == result.kept.epoch + 3 < 12


def test_the_average_counts_once_it_has_caught_up() -> None:
    def scores(accuracy: float) -> Scores:
        return Scores(loss=1 - accuracy, accuracy=accuracy, balanced_accuracy=0.5, macro_f1=0.5, ece=0.0)

    epoch = EpochMetrics(
        epoch=1, step=1, lr=0.1, train_loss=1.0, raw=scores(0.8), averaged=scores(0.3), averaged_counts=False,
        images=100, images_per_s=1.0, elapsed_s=1.0,
    )  # fmt: skip
    assert epoch.score("accuracy") == 0.8
    assert epoch.score("nll") == pytest.approx(0.2)
    assert dataclasses.replace(epoch, averaged_counts=True).score("accuracy") == 0.3
    assert epoch.row()["averaged_val_accuracy"] == 0.3


def test_rows_of_metrics_have_the_documented_keys(digits: Splits, tiny: TrainConfig) -> None:
    result = train(tiny, digits, device=CPU)
    keys = {"epoch", "step", "lr", "train_loss", "val_loss", "val_accuracy", "val_macro_f1"}
    keys |= {"images_per_s", "elapsed_s"}
    for number, epoch in enumerate(result.history, start=1):
        row = epoch.row()
        assert keys <= row.keys()
        assert row["epoch"] == number
        assert row["step"] == number * 3  # 192 images in batches of 64


def test_an_epoch_has_the_configured_visits(digits: Splits, tiny: TrainConfig) -> None:
    counts = digits.labels[digits.train].bincount()
    config = tiny.override({"epochs": 1, "sampling.oversample": 2, "sampling.undersample": 0.9})
    cap = round(0.9 * counts.max().item())
    visits = int(torch.minimum(2 * counts, torch.tensor(cap)).sum())
    assert train(config, digits, device=CPU).history[0].step == len(batch_sizes(visits, 64))


def test_a_plateau_reduces_the_rate(digits: Splits, tiny: TrainConfig) -> None:
    stalled = {"schedule.name": "plateau", "schedule.patience_fraction": 0.25, "schedule.warmup_fraction": 0.0}
    config = tiny.override({"epochs": 8, "optim.lr_scale": 1e-6, "schedule.gamma": 0.5, **stalled})
    history = train(config, digits, device=CPU).history
    factors = [epoch.lr / config.optim.peak_lr(64) for epoch in history]
    scores = [epoch.score("accuracy") for epoch in history]
    expected = [0.5 ** reductions(config.schedule, scores[:n], maximize=True, epochs=8) for n in range(8)]
    assert factors == pytest.approx(expected)
    assert factors[-1] < 1


def test_smoothing_falls_for_good_when_the_validation_loss_has_not(digits: Splits, tiny: TrainConfig) -> None:
    falling = {"loss.smoothing": 0.4, "loss.smoothing_final": 0.1, "loss.smoothing_patience_fraction": 0.25}
    config = tiny.override({"epochs": 8, "optim.lr_scale": 1e-9, **falling})
    history = train(config, digits, device=CPU).history
    after = saturated_from(config.loss, [epoch.score("nll") for epoch in history], epochs=8)
    assert after is not None
    assert 2 <= after < 8
    switched = {"loss.smoothing_patience_fraction": None, "loss.smoothing_final_from": after / 8}
    again = train(config.override(switched), digits, device=CPU).history
    assert [epoch.train_loss for epoch in again] == [epoch.train_loss for epoch in history]
    constant = train(tiny.override({"epochs": 8, "optim.lr_scale": 1e-9, "loss.smoothing": 0.4}), digits, device=CPU)
    same = [one.train_loss == other.train_loss for one, other in zip(history, constant.history, strict=True)]
    assert same == [True] * after + [False] * (8 - after)


def test_named_caps_shorten_the_epoch_and_unknown_classes_are_refused(digits: Splits, tiny: TrainConfig) -> None:
    counts = digits.labels[digits.train].bincount()
    config = tiny.override({"epochs": 1, "sampling.caps": {"3": 0.5, "7": 10}})
    visits = int(counts.sum() - counts[3] - counts[7]) + round(0.5 * int(counts[3])) + 10
    assert train(config, digits, device=CPU).history[0].step == len(batch_sizes(visits, 64))
    with pytest.raises(ConfigError, match=r"sampling.caps: three is no class of the data; its classes are 0, 1, 2"):
        train(tiny.override({"sampling.caps": {"three": 0.5}}), digits, device=CPU)


def test_smoothing_that_waits_for_validation_is_refused_without_it(digits: Splits, tiny: TrainConfig) -> None:
    waiting = tiny.override({"loss.smoothing_final": 0.0, "loss.smoothing_patience_fraction": 0.5})
    with pytest.raises(ConfigError, match="smoothing_patience_fraction needs validation images"):
        train(waiting, digits.whole(), device=CPU)


def test_a_plateau_without_validation_images_is_refused(digits: Splits, tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="plateau needs validation images"):
        train(tiny.override({"schedule.name": "plateau"}), digits.whole(), device=CPU)


def test_images_too_small_at_the_start_are_refused(digits: Splits, tiny: TrainConfig) -> None:
    config = tiny.override(
        {"model.name": "vgg", "model.widths": (8, 8, 8), "model.blocks": (1, 1, 1), "augment.start_size_fraction": 0.5}
    )
    with pytest.raises(ConfigError, match=r"start_size_fraction: images grow from 4×4 on; raise it .*4×4 is down to"):
        train(config, digits, device=CPU)


def test_an_unsupported_intermediate_size_is_refused(digits: Splits, tiny: TrainConfig) -> None:
    """The network supports 32 and 64 pixels, but not 40."""
    large = dataclasses.replace(digits, images=digits.images[:8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    few = dataclasses.replace(large, labels=digits.labels[:8], train=torch.arange(6), val=torch.arange(6, 8))
    plain = {"model.widths": (64, 128, 256, 512), "model.blocks": (2, 2, 2, 2)}
    config = tiny.override({**plain, "model.name": "timm/dla46_c", "augment.start_size_fraction": 0.5, "batch_size": 2})
    with pytest.raises(ConfigError, match=r"images grow from 40×40 on; .*dla46_c cannot take images of 40×40"):
        train(config, few, device=CPU)


def test_resuming_a_finished_training_returns_its_history_and_result(
    digits: Splits, tiny: TrainConfig, tmp_path: Path
) -> None:
    config, path = tiny.override({"averaging.name": "ema"}), tmp_path / "end.pt"
    told: list[EpochMetrics] = []
    again: list[EpochMetrics] = []
    ended = train(config, digits, device=CPU, checkpoint_to=path, checkpoint_at_end=True, on_epoch_end=told.append)
    resumed = train(config, digits, device=CPU, resume_from=path, on_resume=again.extend)
    assert again == told == list(resumed.history)
    assert same(ended, resumed)
    assert ended.val_logits is not None
    assert resumed.val_logits is not None
    assert torch.equal(ended.val_logits, resumed.val_logits)


@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [
        (10, 5, [5, 5]),
        (12, 5, [5, 5, 2]),
        (11, 5, [5, 6]),  # batch norm needs two images
        (3, 5, [3]),
        (6, 5, [6]),
    ],
)
def test_no_batch_has_a_single_image(images: int, batch: int, sizes: list[int]) -> None:
    assert batch_sizes(images, batch) == sizes


def test_a_single_training_image_is_refused(digits: Splits, tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        train(tiny, dataclasses.replace(digits, train=torch.tensor([0])), device=CPU)


def test_a_short_ema_follows_the_weights(digits: Splits, tiny: TrainConfig) -> None:
    """Without the warm-up, the average of a short run would still be the initial weights."""
    config = tiny.override({"epochs": 15})
    averaged = train(config.override({"averaging.name": "ema"}), digits, device=CPU)
    assert averaged.value("accuracy") > train(config, digits, device=CPU).value("accuracy") - 0.05


def test_weights_are_validated_until_their_average_has_caught_up(digits: Splits, tiny: TrainConfig) -> None:
    history = train(tiny.override({"epochs": 8, "averaging.name": "ema"}), digits, device=CPU).history
    assert [epoch.raw is not None for epoch in history] == [True] + [False] * 7  # a quarter of the run is two epochs
    assert all(epoch.averaged is not None and epoch.validated for epoch in history)
    assert "raw_val_accuracy" in history[0].row()
    assert "raw_val_accuracy" not in history[1].row()
    assert history[1].row()["val_accuracy"] == history[1].row()["averaged_val_accuracy"]


def test_seconds_per_epoch_is_plausible(digits: Splits, tiny: TrainConfig) -> None:
    estimate = seconds_per_epoch(tiny, digits, device=CPU)
    assert 0 < estimate < 10
