"""`hpo train RECIPE --profile`: its output, its files, and the unchanged training. All on real digits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import core.loop.profile
import hpo.search.profile
import hpo.search.training
from core.loop import EpochMetrics, TrainResult
from core.loop.profile import Profile, Times
from hpo.paths import TrainingPaths, studies_root
from tests.hpo.commands import RunHpo

TRAIN = ["train", "digits_base", "--set", "epochs=2", "--set", "model.widths=[8]", "--set", "model.blocks=[1]"]
EMA = ["--set", "averaging.name=ema"]
FOLDS = ["--set", "data.folds=2"]
PARTS = ["augment", "forward", "backward", "optimizer", "averaging", "evaluation", "host"]

MEASURED = Profile(
    launched=Times({"augment": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 0.5, "averaging": 0.5}, host_s=8.0),
    replayed=Times({"augment": 0.5, "forward": 1.5, "backward": 2.0, "optimizer": 0.3, "averaging": 0.2}, host_s=0.02),
    evaluation_s=1.25,
    images=5000,
    steps=40,
    timed_steps=20,
    parameters=11_173_962,
    flops_per_image=10**11,
    dtype="bfloat16",
    peak_flops=7.9e14,
    peak_memory_bytes=3 * 2**30,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and the device's peak from a small product."""
    monkeypatch.setattr(core.loop.profile, "MEASURED_S", 0.0)
    monkeypatch.setattr(core.loop.profile, "LONGEST_PRODUCT_S", 0.0)


def hpo_train(run_hpo: RunHpo, *options: str) -> TrainingPaths:
    """Run the command and return the one training's folder."""
    run_hpo(*TRAIN, "--device", "cpu", *options)
    (folder,) = studies_root().glob("trainings/*")
    return TrainingPaths(folder)


def said(monkeypatch: pytest.MonkeyPatch, measured: Profile, run_hpo: RunHpo) -> list[str]:
    """The lines of a profile that came to this, without those before and after it."""
    monkeypatch.setattr(hpo.search.profile, "profile", lambda *_, **__: measured)
    output = run_hpo(*TRAIN, "--device", "cpu", "--profile")
    lines = [line.rstrip() for line in output.splitlines()]
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(w)) for w in ("profiling", "training"))
    return lines[first + 1 : last]


class TestTheTable:
    def test_of_graphs_shows_both_times_and_the_saving(self, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
        lines = said(monkeypatch, MEASURED, run_hpo)
        assert lines == [
            "part        s an epoch  share  kernel by kernel, s",
            "augment          0.500    9 %                1.000",
            "forward          1.500   26 %                2.000",
            "backward         2.000   35 %                4.000",
            "optimizer        0.300    5 %                0.500",
            "averaging        0.200    3 %                0.500",
            "evaluation       1.250   22 %                1.250",
            "host             0.020  0.3 %                8.000",
            "epoch            5.770  100 %               17.250",
            "images/s: 867; without evaluation 1,106",
            "a step: 113 ms, 40 an epoch",
            "a step kernel by kernel: 400 ms; its CUDA graph saves 72 % of that",
            "arithmetic of a step: 111 TFLOP/s, 14 % of the device's peak",
            "arithmetic of forward and backward: 143 TFLOP/s, 18 % of the device's peak",
            "the device's peak: 790 TFLOP/s, measured here, multiplying bfloat16 matrices",
            "memory: 3.00 GiB at most, images and weights included",
            "host: the rest, mostly Python and gathering images or waiting for them",
            "largest cost: backward, 35 % of an epoch",
        ]

    def test_without_a_gpu_leaves_graphs_and_memory_out(self, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
        plain = dataclasses.replace(MEASURED, replayed=None, peak_memory_bytes=None)
        text = "\n".join(said(monkeypatch, plain, run_hpo))
        assert "kernel" not in text
        assert "memory" not in text
        assert text.endswith("largest cost: host, 46 % of an epoch")

    def test_fits_a_terminal_of_80_columns(self, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
        slow = dataclasses.replace(MEASURED, evaluation_s=43_210.0, peak_flops=7.9e10, flops_per_image=10**4)
        lines = said(monkeypatch, slow, run_hpo)
        assert max(map(len, lines)) <= 80
        assert "evaluation       43210  100 %                43210" in lines  # as many digits as there are, no more


class TestTheFiles:
    def test_hold_the_table(self, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
        lines = said(monkeypatch, MEASURED, run_hpo)
        (folder,) = studies_root().glob("trainings/*")
        written = TrainingPaths(folder).profile_table.read_text(encoding="utf-8").splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written if line.startswith("| ")]
        shown = ["".join(row).replace(" ", "") for row in (rows[0], *rows[2:])]  # the second is Markdown's rule
        assert shown == [line.replace(" ", "") for line in lines[:9]]
        assert [line.removeprefix("- ") for line in written if line.startswith("- ")] == lines[9:]

    def test_hold_every_number_and_the_sizes(self, run_hpo: RunHpo) -> None:
        paths = hpo_train(run_hpo, "--profile", *EMA)
        numbers: dict[str, Any] = json.loads(paths.profile.read_text())
        assert list(numbers["shares"]) == PARTS
        assert sum(numbers["shares"].values()) == pytest.approx(1)
        launched = numbers["launched"]
        parts = [*launched["sections_s"].values(), launched["host_s"], numbers["evaluation_s"]]
        assert sum(parts) == pytest.approx(numbers["epoch_s"])
        assert numbers["largest"] == max(numbers["shares"], key=numbers["shares"].get)
        assert numbers["step_share_of_peak"] == pytest.approx(numbers["step_flops"] / numbers["peak_flops"])
        assert numbers["sizes"]["image"] == [1, 8, 8]
        assert numbers["sizes"]["train_images"] == numbers["images"]
        assert numbers["recipe"] == "digits_base"
        assert numbers["device"].startswith("CPU, ")
        assert numbers["versions"]["torch"] in torch.__version__

    def test_are_not_written_without_the_option(self, run_hpo: RunHpo) -> None:
        paths = hpo_train(run_hpo)
        assert not paths.profile.exists()
        assert not paths.profile_table.exists()


class TestTheTraining:
    @pytest.mark.parametrize("options", [EMA, FOLDS], ids=["ema", "folds"])
    def test_is_bitwise_the_same_as_without(self, options: list[str], run_hpo: RunHpo) -> None:
        paths = hpo_train(run_hpo, *options)
        models = sorted(paths.dir.glob("*.safetensors"))
        without = [load_file(model) for model in models]
        scores = epochs_of(paths)
        again = hpo_train(run_hpo, "--profile", *options)
        assert again == paths  # the option makes no other training of it
        assert paths.profile.exists()
        assert sorted(paths.dir.glob("*.safetensors")) == models
        for before, model in zip(without, models, strict=True):
            after = load_file(model)
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert epochs_of(paths) == scores

    def test_with_folds_is_profiled_once_on_the_first_fold(self, run_hpo: RunHpo) -> None:
        paths = hpo_train(run_hpo, "--profile", *FOLDS)
        numbers = json.loads(paths.profile.read_text())
        rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
        assert [row["fold"] for row in rows] == [1, 1, 2, 2]
        assert numbers["images"] * 2 == pytest.approx(1438, abs=2)  # halves of what is not test

    def test_resumes_from_its_checkpoint(self, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
        """The first fold's checkpoint waits for the second, which is stopped here at its first epoch."""
        train = hpo.search.training.train

        def cut_off(config: Any, *args: Any, **kwargs: Any) -> TrainResult:
            if config.seed != 0:
                raise KeyboardInterrupt
            return train(config, *args, **kwargs)

        monkeypatch.setattr(hpo.search.training, "train", cut_off)
        run_hpo(*TRAIN, *FOLDS, "--device", "cpu", code=130)  # the exit code of a shell after Ctrl-C
        trained: list[str] = []

        def counted(config: Any, *args: Any, on_epoch_end: Any, **kwargs: Any) -> TrainResult:
            def told(epoch: EpochMetrics) -> None:
                trained.append(f"{config.seed == 0}, {epoch.epoch}")
                on_epoch_end(epoch)

            return train(config, *args, on_epoch_end=told, **kwargs)

        monkeypatch.setattr(hpo.search.training, "train", counted)
        output = run_hpo(*TRAIN, "--device", "cpu", "--profile", *FOLDS)
        assert "resuming from its checkpoint" in output
        assert trained == ["False, 1", "False, 2"]
        assert list(studies_root().glob("trainings/*/profile.json"))


def epochs_of(paths: TrainingPaths) -> list[dict[str, Any]]:
    """Its rows of metrics, without times."""
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("images_per_s", "elapsed_s")} for row in rows]
