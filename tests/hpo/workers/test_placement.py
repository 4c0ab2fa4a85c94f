"""The options that place trials on devices."""

from __future__ import annotations

import os

import pytest
import torch

from core.errors import UserError
from hpo.workers.local import VISIBLE, run_in_child, visible_to
from hpo.workers.placement import place


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs in name: nothing is computed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "devices", "workers", "per_device", "placed"),
    [
        (None, None, None, None, {"cuda:0": 1}),
        ("cpu", None, None, None, {"cpu": 1}),
        (None, None, None, "3", {"cuda:0": 3}),
        (None, None, 3, None, {"cuda:0": 3}),
        (None, None, None, "auto", {"cuda:0": None}),
        (None, "all", None, None, {"cuda:0": 1, "cuda:1": 1}),
        (None, "cuda:1, cuda:0", None, "2", {"cuda:1": 2, "cuda:0": 2}),
        (None, "cuda:0,cuda:1", 5, None, {"cuda:0": 3, "cuda:1": 2}),
        (None, "cuda:0,cuda:1", 3, "2", {"cuda:0": 2, "cuda:1": 1}),
        (None, "all", None, "auto", {"cuda:0": None, "cuda:1": None}),
        (None, "all", 0, None, {"cuda:0": 0, "cuda:1": 0}),
    ],
)
def test_omitted_options_follow_from_the_given_ones(
    device: str | None,
    devices: str | None,
    workers: int | None,
    per_device: str | None,
    placed: dict[str, int | None],
) -> None:
    assert {str(name): number for name, number in place(device, devices, workers, per_device)} == placed


@pytest.mark.parametrize(
    ("workers", "per_device", "in_processes"),
    [(None, None, False), (None, "1", False), (1, None, True), (None, "2", True), (None, "auto", False)],
)
def test_one_trial_at_a_time_has_its_own_process_only_with_workers_1(
    workers: int | None, per_device: str | None, in_processes: bool
) -> None:
    assert place("cpu", None, workers, per_device).in_processes is in_processes


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "devices", "workers", "per_device", "said"),
    [
        ("cpu", "cuda:0", None, None, "--device and --devices: give one of the two"),
        (None, "cuda:0,cuda:2", None, None, "--devices cuda:2: this machine has 2 CUDA devices; give cpu or omit "
         "it"),
        (None, "cuda:0,cuda", None, None, "--devices cuda:0,cuda: cuda:0 is there twice; --per-device sets how many "
         "trials it takes"),
        (None, "all", 1, None, "--workers 1: fewer than the 2 devices; give as many, or fewer --devices"),
        (None, "all", 5, "2", "--workers 5: 2 devices with --per-device 2 take 4; leave one of the two out"),
        (None, None, 2, "auto", "--workers 2: --per-device auto measures the number; leave one of the two out"),
        (None, None, None, "0", "--per-device 0: give a whole number from 1 on, or auto"),
    ],
)  # fmt: skip
def test_a_contradiction_is_a_one_line_error(
    device: str | None, devices: str | None, workers: int | None, per_device: str | None, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        place(device, devices, workers, per_device)
    assert str(refused.value) == said


def test_all_devices_of_a_machine_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^--devices all: this machine has no GPU; leave it out for the CPU$"):
        place(None, "all", None, None)


@pytest.mark.parametrize(
    ("here", "device", "visible"),
    [
        (None, "cpu", None),
        (None, "cuda:1", "1"),
        (None, "cuda", "0"),
        ("4,6", "cuda:1", "6"),
        ("GPU-0a1b,MIG-2c3d", "cuda:1", "MIG-2c3d"),
    ],
)
def test_a_worker_sees_only_its_own_gpu_by_the_name_that_the_driver_knows(
    here: str | None, device: str, visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    if here is not None:
        monkeypatch.setenv(VISIBLE, here)
    assert visible_to(device) == visible


def test_a_process_gets_the_environment_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fork server's child, whose server has an older environment."""
    monkeypatch.setattr(os, "environ", {"OLD": "1", VISIBLE: "7"})
    seen: list[dict[str, str]] = []
    run_in_child({VISIBLE: "1", "NEW": "2"}, lambda: seen.append(dict(os.environ)))
    assert seen == [{VISIBLE: "1", "NEW": "2"}]
