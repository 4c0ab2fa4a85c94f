"""EMA matches timm and torch with a warm-up of its decay; SWA, `mean_of` and recalibration match torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from core.averaging import Averaging, build_averaging, mean_of, recalibrate
from core.config import AveragingConfig
from tests.core.launches import launches
from tests.core.recorded import RecordedGraph

STEPS, EPOCHS = 120, 12
PER_EPOCH = STEPS // EPOCHS
# The decay has warmed up by the sixth update.
SHORT = 0.01


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).to(memory_format=torch.channels_last)


@torch.no_grad()
def wander(model: nn.Module, generator: torch.Generator) -> None:
    """Simulate a training step: change parameters, running statistics and the batch counter."""
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer += 1


def ema(model: nn.Module, half_life_fraction: float = SHORT) -> Averaging:
    averaging = build_averaging(
        AveragingConfig(name="ema", half_life_fraction=half_life_fraction), model, STEPS, EPOCHS
    )
    assert averaging is not None
    return averaging


def swa(model: nn.Module, start: float = 0.75) -> Averaging:
    averaging = build_averaging(AveragingConfig(name="swa", swa_start_fraction=start), model, STEPS, EPOCHS)
    assert averaging is not None
    return averaging


def update(averaging: Averaging) -> None:
    """Average one step."""
    averaging.update(averaging.next_weight() or 0.0)
    averaging.end_update()


def follow(model: nn.Module, averaging: Averaging, each_step: Callable[[int], None] = lambda _: None) -> None:
    """Run `wander` with averaging."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        wander(model, generator)
        update(averaging)
        each_step(step)
        if (step + 1) % PER_EPOCH == 0:
            averaging.end_epoch((step + 1) // PER_EPOCH)


def test_averaging_none_builds_nothing() -> None:
    assert build_averaging(AveragingConfig(name="none"), network(), STEPS, EPOCHS) is None


# ---- EMA


def test_ema_matches_timm_with_the_same_decays() -> None:
    model = network()
    averaging, theirs = ema(model), ModelEmaV3(model)
    decay = 0.5 ** (1 / (SHORT * STEPS))

    def each_step(t: int) -> None:
        theirs.decay = min(decay, (1 + t) / (10 + t))
        theirs.update(model)

    follow(model, averaging, each_step)
    for name, tensor in theirs.module.state_dict().items():
        torch.testing.assert_close(averaging.module.state_dict()[name], tensor, rtol=0, atol=0)


def test_ema_matches_torch_after_the_warmup() -> None:
    model = network()
    averaging = ema(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        wander(model, generator)
        update(averaging)
    theirs = AveragedModel(
        averaging.module, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (1 / (SHORT * STEPS))), use_buffers=True
    )
    theirs.n_averaged += 1  # already an average
    for _ in range(20):
        wander(model, generator)
        update(averaging)
        theirs.update_parameters(model)
    for ours, reference in zip(averaging.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_an_update_with_a_tensor_weight_is_one_pass_over_the_weights() -> None:
    model = network()
    averaging, weight = ema(model, 0.05), torch.tensor(0.1)
    assert launches(lambda: averaging.update(weight)) == 2  # the other copies the batch counters


def test_an_average_in_another_memory_layout_is_refused() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.zeros(2, 6)[:, ::2])  # its copy has no gaps
    with pytest.raises(ValueError, match="memory layout"):
        ema(model, 0.05)


def test_a_replayed_update_with_a_tensor_weight_matches_numbers() -> None:
    """Within float32 rounding of numbers up to about 10."""
    model = network()
    of_numbers, of_tensors, recorded = ema(model, 0.05), ema(model, 0.05), ema(model, 0.05)
    generator = torch.Generator().manual_seed(1)
    weight, weights = torch.zeros(()), set()

    def again() -> None:
        recorded.update(weight)

    for _ in range(STEPS):
        wander(model, generator)
        number = of_numbers.next_weight()
        assert number is not None
        weights.add(number)
        weight.fill_(number)
        of_numbers.update(number)
        of_tensors.update(weight)
        if len(weights) == 1:
            again = RecordedGraph.capture(again)
        else:
            again()
        for averaging in (of_numbers, of_tensors, recorded):
            averaging.end_update()
    assert 0.9 in weights
    assert min(weights) == 1 - 0.5 ** (1 / (0.05 * STEPS)) < 0.11
    for name, tensor in recorded.module.state_dict().items():
        assert torch.equal(tensor, of_tensors.module.state_dict()[name]), name
        torch.testing.assert_close(tensor, of_numbers.module.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_a_contribution_halves_in_a_half_life() -> None:
    model = nn.Linear(1, 1, bias=False)
    half_life = 30
    averaging = ema(model, half_life / STEPS)
    nn.init.ones_(model.weight)
    for _ in range(10_000):
        update(averaging)
    nn.init.zeros_(model.weight)
    for _ in range(half_life):
        update(averaging)
    assert next(averaging.module.parameters()).item() == pytest.approx(0.5, abs=1e-4)


def test_the_warmup_forgets_the_initial_weights() -> None:
    """After a short run the average must be near the final weights."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)  # the untrained weight is 0, the trained one 1
    averaging = ema(model, half_life_fraction=0.02)
    plain = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    plain.n_averaged += 1
    for step in range(STEPS):
        nn.init.constant_(model.weight, 1 - 0.5 ** (10 * (step + 1) / STEPS))
        update(averaging)
        plain.update_parameters(model)
    assert next(averaging.module.parameters()).item() > 0.99
    assert next(plain.module.parameters()).item() < 0.15


def test_the_warmup_limits_the_lag_to_a_tenth_of_the_steps() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaging = ema(model, half_life_fraction=0.5)  # without a warm-up it would lag by 87 steps
    for step in range(STEPS):
        nn.init.constant_(model.weight, float(step))
        update(averaging)
    assert STEPS * 0.89 < next(averaging.module.parameters()).item() < STEPS - 1


def test_batch_norm_statistics_are_averaged_and_counters_copied() -> None:
    model = network()
    before = model[1].running_mean.clone()
    averaging = ema(model)
    wander(model, torch.Generator().manual_seed(0))
    update(averaging)
    torch.testing.assert_close(averaging.module[1].running_mean, before.lerp(model[1].running_mean, 0.9))
    assert averaging.module[1].num_batches_tracked == model[1].num_batches_tracked == 1


@pytest.mark.parametrize(("epoch", "expected"), [(1, False), (2, False), (3, True), (12, True)])
@pytest.mark.parametrize("half_life_fraction", [0.005, 0.5])
def test_ema_has_caught_up_after_a_quarter_of_the_run(epoch: int, expected: bool, half_life_fraction: float) -> None:
    assert ema(network(), half_life_fraction).caught_up(epoch) is expected


# ---- SWA


@pytest.mark.parametrize("start", [0.0, 0.75, 0.8])
def test_swa_matches_torchs_mean_over_the_last_epochs(start: float) -> None:
    model = network()
    averaging, theirs = swa(model, start), AveragedModel(model)

    def each_step(step: int) -> None:
        if (step + 1) % PER_EPOCH == 0 and (step + 1) // PER_EPOCH >= start * EPOCHS:
            theirs.update_parameters(model)

    follow(model, averaging, each_step)
    for ours, reference in zip(averaging.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_swas_first_epoch_equals_the_weights() -> None:
    model = network()
    averaging = swa(model, start=0.99)
    follow(model, averaging)
    for ours, theirs in zip(averaging.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_swa_is_ready_from_its_start_and_caught_up_with_two_epochs() -> None:
    model = network()
    averaging = swa(model, start=0.75)
    ready = []
    for epoch in range(1, EPOCHS + 1):
        averaging.end_epoch(epoch)
        ready.append(averaging.ready)
    assert ready == [False] * 8 + [True] * 4
    assert [averaging.caught_up(epoch) for epoch in range(1, EPOCHS + 1)] == [False] * 9 + [True] * 3
    assert [swa(model, start=0.0).caught_up(epoch) for epoch in (1, 2)] == [False, True]


def test_only_ema_has_a_weight_for_each_step() -> None:
    model = network()
    averaging = swa(model, start=0.0)
    before = copy.deepcopy(averaging.module.state_dict())
    wander(model, torch.Generator().manual_seed(0))
    assert averaging.next_weight() is None
    update(averaging)
    assert all(torch.equal(tensor, before[name]) for name, tensor in averaging.module.state_dict().items())
    assert not averaging.ready
    assert ema(model).next_weight() == 0.9


def test_only_swa_with_batch_norms_needs_recalibration() -> None:
    assert swa(network()).needs_recalibration
    assert not swa(nn.Linear(2, 2)).needs_recalibration
    assert not ema(network()).needs_recalibration


# ---- the mean over networks


def wandered(seed: int, model: nn.Module | None = None) -> nn.Module:
    """Return a network trained from common initial weights."""
    model = model or network()
    wander(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mean_of_matches_torchs_averaged_model(count: int) -> None:
    models = [wandered(seed) for seed in range(count)]
    theirs = AveragedModel(models[0], use_buffers=True)
    for model in models:
        theirs.update_parameters(model)
    found = mean_of(models).state_dict()
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_mean_of_equal_networks_is_bitwise_equal() -> None:
    models = [wandered(4) for _ in range(7)]
    for name, tensor in mean_of(models).state_dict().items():
        assert torch.equal(tensor, models[0].state_dict()[name]), name


def test_the_mean_is_an_independent_network_in_evaluation_mode() -> None:
    models = [wandered(seed).train() for seed in (1, 2)]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    mean = mean_of(models)
    wander(mean, torch.Generator().manual_seed(9))
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not mean.training
    assert models[0].training
    assert not any(parameter.requires_grad for parameter in mean.parameters())
    assert mean[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert mean(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_the_recalibrated_mean_has_statistics_of_its_activations() -> None:
    """With swapped channels, the mean of two networks' statistics differs from those of their mean."""
    one, other = wandered(1), wandered(1)
    with torch.no_grad():
        order = torch.arange(8).roll(1)
        other[0].weight.copy_(other[0].weight[order])
        other[0].bias.copy_(other[0].bias[order])
    for model in (one, other):
        recalibrate(model, batches())
    mean = mean_of([one, other])
    stale = mean[1].running_var.clone()
    recalibrate(mean, batches())
    with torch.no_grad():
        seen = torch.stack([mean[0](images).var((0, 2, 3)) for images in batches()]).mean(0)
    torch.testing.assert_close(mean[1].running_var, seen)
    assert (stale - seen).abs().max() > 0.2 * seen.min()


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 9, 3))])
def test_different_architectures_cannot_be_averaged(other: nn.Module) -> None:
    with pytest.raises(ValueError, match="not of one architecture"):
        mean_of([network(), other])


def test_an_empty_list_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="no networks"):
        mean_of([])


# ---- recalibration


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [2 + 3 * torch.randn(16, 3, 8, 8, generator=generator) for _ in range(5)]


def test_recalibration_matches_torchs_update_bn() -> None:
    model = network()
    model[3].p = 0.0
    theirs = copy.deepcopy(model)
    recalibrate(model, batches())
    update_bn(batches(), theirs)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_recalibration_discards_old_statistics() -> None:
    one, other = network(), network()
    wander(other[1], torch.Generator().manual_seed(0))
    other[1].load_state_dict({**other[1].state_dict(), "weight": one[1].weight, "bias": one[1].bias})
    recalibrate(one, batches())
    recalibrate(other, iter(batches()))
    assert torch.equal(one[1].running_mean, other[1].running_mean)
    assert torch.equal(one[1].running_var, other[1].running_var)


def test_recalibration_keeps_random_state_modes_and_momentum() -> None:
    model = network().train()
    model[3].eval()
    random_state = torch.get_rng_state()
    recalibrate(model, batches())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, True, True, False, True, True, True]
    assert model[1].momentum == 0.1


def test_recalibration_without_batch_norms_reads_nothing() -> None:
    recalibrate(nn.Linear(2, 2), (pytest.fail("read a batch") for _ in range(1)))


def test_recalibration_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch"):
        recalibrate(network(), [])


# ---- both


@pytest.mark.parametrize("build", [ema, swa])
def test_the_average_is_an_independent_network_in_evaluation_mode(build: Callable[[nn.Module], Averaging]) -> None:
    model = network()
    averaging = build(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update(averaging)
    averaging.end_epoch(EPOCHS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not averaging.module.training
    assert not any(parameter.requires_grad for parameter in averaging.module.parameters())
    assert averaging.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert averaging.module(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("build", [ema, swa])
def test_a_resumed_average_equals_the_uninterrupted_one_bitwise(build: Callable[[nn.Module], Averaging]) -> None:
    model = network()
    whole = build(model)
    saved: list[tuple[dict[str, object], dict[str, object]]] = []

    def save(step: int) -> None:
        if step == 104:
            saved.append(copy.deepcopy((model.state_dict(), whole.state_dict())))

    follow(model, whole, save)

    resumed_model = network()
    resumed = build(resumed_model)
    resumed_model.load_state_dict(saved[0][0])
    resumed.load_state_dict(saved[0][1])
    generator = torch.Generator().manual_seed(1)
    throwaway = network()
    for _ in range(105):
        wander(throwaway, generator)  # same generator state
    for step in range(105, STEPS):
        wander(resumed_model, generator)
        update(resumed)
        if (step + 1) % PER_EPOCH == 0:
            resumed.end_epoch((step + 1) // PER_EPOCH)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor), name
