"""Compilation of blocks. A backend that runs the traced operations stands in for inductor, which takes minutes."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from core.config import TrainConfig
from core.data import Splits
from core.loop import Execution, TrainResult, train
from core.loop.run import Run
from core.models import build_model, compilation
from core.models.compilation import Estimate, blocks, compiled, normed_elements, with_compiled_blocks
from tests.core.step_configs import NETWORKS
from tests.core.trainings import CPU, STATEFUL, EveryStepByPython, same

# Of dynamo's own access, which it hides from users.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    monkeypatch.setattr(compilation, "_compiled", ("", ""))
    compilation._trained_images.clear()
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def slow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which compilation always pays."""
    monkeypatch.setattr(compilation, "bandwidth", lambda device: 1.0)


AUTO = {"precision.compile": "auto"}


def network(changes: dict[str, Any], side: int = 32) -> nn.Module:
    config = TrainConfig().override({"model.widths": (8, 16), "model.blocks": (3, 2), **changes})
    torch.manual_seed(0)
    return build_model(config.model, num_classes=10, in_channels=3, image_size=(side, side))


def losses(result: TrainResult) -> list[float]:
    return [epoch.train_loss for epoch in result.history]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ["BasicBlock"] * 5),
        ({"model.block": "bottleneck", "model.se": True, "model.anti_alias": True}, ["Bottleneck"] * 5),
        ({"model.name": "vgg"}, ["Sequential"]),  # has none: the network
        ({"model.name": "timm/test_vit", **NETWORKS["timm/test_vit"]}, ["Block"] * 6),
        ({"model.name": "timm/test_convnext", **NETWORKS["timm/test_convnext"]}, ["ConvNeXtBlock"] * 9),
    ],
)
def test_the_blocks_of_a_family_are_found(changes: dict[str, Any], kinds: list[str]) -> None:
    assert [type(block).__name__ for block in blocks(network(changes, 160))] == kinds


@pytest.mark.parametrize("name", ["resnet", *NETWORKS])
def test_a_twin_computes_the_networks_outputs_and_gradients_on_its_own_tensors(name: str) -> None:
    model = network({"model.name": name, **NETWORKS.get(name, {})}, 160)
    plain = copy.deepcopy(model)
    twin = with_compiled_blocks(model)
    images = torch.randn(4, 3, 160, 160).to(memory_format=torch.channels_last)
    outputs = []
    for net in (plain, twin):
        torch.manual_seed(1)
        outputs.append(net(images))
        outputs[-1].square().sum().backward()
    assert torch.allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for (key, tensor), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(tensor, other, rtol=1e-4, atol=1e-5), key  # running statistics
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))


def test_blocks_of_one_kind_are_compiled_once_and_shared_by_later_networks() -> None:
    """Three equal blocks, then one with a shortcut and one without."""
    for expected in (3, 0):
        counters.clear()
        with_compiled_blocks(network({}))(torch.randn(4, 3, 32, 32)).sum().backward()
        assert counters["stats"]["unique_graphs"] == expected


@pytest.mark.usefixtures("slow_memory")
class TestATrainingWithCompiledBlocks:
    @pytest.mark.parametrize(
        "case",
        ["sgd, swa", "muon, copies, alternating flips, growing", "the head first, on a plateau"],
    )
    def test_has_equal_losses_and_an_unchanged_result(self, digits: Splits, tiny: TrainConfig, case: str) -> None:
        config = tiny.override(STATEFUL[case])
        plain, auto = (train(config.override(each), digits, device=CPU) for each in ({}, AUTO))
        assert counters["stats"]["unique_graphs"] > 0
        assert losses(auto) == pytest.approx(losses(plain), rel=1e-3)
        assert auto.model.state_dict().keys() == plain.model.state_dict().keys()
        assert str(auto.model) == str(plain.model)

    def test_compiles_each_kind_for_each_shape_of_batch(self, digits: Splits, tiny: TrainConfig) -> None:
        config = tiny.override({**AUTO, "batch_size": 80, "augment.start_size_fraction": 0.5, "averaging.name": "ema"})
        run = Run(config, digits, CPU)
        network, shapes = run.one_step.network, set()

        def watched(images: torch.Tensor) -> torch.Tensor:
            shapes.add(images.shape)
            return network(images)

        run.one_step.network = watched
        run.model.train()
        for epoch in range(1, config.epochs + 1):
            for batch in run.batches(epoch):
                run.step(batch)
        assert len(shapes) > 4
        assert counters["stats"]["unique_graphs"] == 2 * len(shapes)
        assert run.averaging is not None
        for model in (run.model, run.averaging.module):  # are not compiled
            run.logits(model, digits.val)
        assert counters["stats"]["unique_graphs"] == 2 * len(shapes)

    def test_can_be_captured_and_split(self, digits: Splits, tiny: TrainConfig) -> None:
        config = tiny.override(AUTO)
        captured = train(config, digits, device=CPU, execution=Execution(capture=EveryStepByPython))
        assert losses(captured) == pytest.approx(losses(train(tiny, digits, device=CPU)), rel=1e-3)
        run, plain = (Run(each.override({"model.norm": "group"}), digits, CPU) for each in (config, tiny))
        for each in (run, plain):
            each.model.train()
            each.one_step.micro_batch = 24  # of 64: 24, 24, 16
            each.step(next(each.batches(epoch=1)))
        assert run.one_step.loss_sum.item() == pytest.approx(plain.one_step.loss_sum.item(), rel=1e-4)

    def test_resumes_from_a_checkpoint_of_a_plain_one(self, digits: Splits, tiny: TrainConfig, tmp_path: Any) -> None:
        path = tmp_path / "half.pt"
        train(tiny.override(AUTO), digits, device=CPU, stop_after=2, checkpoint_to=path, checkpoint_at_end=True)
        keys = torch.load(path, weights_only=True)["model"].keys()
        assert keys == Run(tiny, digits, CPU).model.state_dict().keys()

    @pytest.mark.parametrize("compilation_of", ["auto", True])
    def test_holds_no_memory_afterwards(
        self, digits: Splits, tiny: TrainConfig, compilation_of: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept: list[weakref.ref[Any]] = []
        config = tiny.override({"precision.compile": compilation_of, "epochs": 1})

        def train_once() -> None:
            with Run(config, digits, CPU) as run:
                run.epoch(final=True)
                kept.extend(map(weakref.ref, run.model.parameters()))

        gc.disable()
        try:
            train_once()
            assert [ref() for ref in kept] == [None] * len(kept)
        finally:
            gc.enable()


class TestTheDecision:
    def test_compares_the_passes_saved_with_the_time_to_compile(self) -> None:
        """ResNet-18 at 96² in bfloat16 on 4.8 TB/s: seven kinds of blocks, two sizes of batches, 70 s."""
        model = network({"model.widths": (64, 128, 256, 512), "model.blocks": (2, 2, 2, 2)}, 96)
        stage = 64 * 96**2
        elements = stage * 4 + (stage // 2 + stage // 4 + stage // 8) * 5
        assert normed_elements(model, (3, 96, 96)) == elements
        saved_s = 3.5 * 2 * elements / 4.8e12
        assert saved_s * 256 == pytest.approx(1.8e-3, rel=0.1)
        kinds = len(compilation.block_kinds(model))
        assert kinds == 7
        estimates = [Estimate(kinds, 2, saved_s, images) for images in (9_000_000, 12_000_000)]
        assert [estimate.pays for estimate in estimates] == [False, True]
        assert [estimate.cost_s for estimate in estimates] == [70.0, 70.0]
        assert str(estimates[0]) == (
            "precision.compile: auto: not compiling 7 kinds of blocks for 2 shapes of batches, "
            "which takes about 70 s and saves 64.8 s in 9,000,000 images"
        )

    def test_counts_earlier_trainings_of_the_architecture(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each training saves 0.4 of the cost: the third one compiles, and those after it."""
        elements = normed_elements(Run(tiny, digits, CPU).model, (1, 8, 8))
        images = 192 * tiny.epochs
        per_second = 3.5 * 4 * elements * images / (0.4 * compilation.COMPILE_S * 2 * 1)
        monkeypatch.setattr(compilation, "bandwidth", lambda device: per_second)
        found = []
        for seed in range(4):
            counters.clear()
            train(tiny.override({**AUTO, "seed": seed}), digits, device=CPU)
            found.append(counters["stats"]["unique_graphs"])
        assert found == [0, 0, 2, 0]
        assert compilation._compiled[0] == "blocks"

    def test_is_against_it_on_a_cpu(self, digits: Splits, tiny: TrainConfig) -> None:
        assert compilation.bandwidth(CPU) == math.inf
        assert same(train(tiny.override(AUTO), digits, device=CPU), train(tiny, digits, device=CPU))
        assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_the_field_takes_bools_and_auto(value: Any) -> None:
    assert TrainConfig().override({"precision.compile": value}).precision.compile is value


def test_each_architecture_is_compiled_for_as_many_shapes_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a backend that compiles nothing. Beyond its limit torch would silently run without compilation."""
    assert compilation.RECOMPILE_LIMIT >= 16
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 4)
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    sides = range(5, 9)
    for width in range(1, 4):  # 12 shapes in all, also more than torch's limit of 8
        compiled_network = compiled(nn.Sequential(nn.Conv2d(1, width, 3)))
        for side in sides:
            assert compiled_network(torch.zeros(2, 1, side, side)).shape == (2, width, side - 2, side - 2)
    with pytest.raises(Exception, match="recompile_limit"):
        compiled_network(torch.zeros(2, 1, 9, 9))
