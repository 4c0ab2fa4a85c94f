"""Each optimizer matches torch's with uniform weight decay; SWATS matches Algorithm 1 of the paper."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import pytest
import timm.optim.muon
import torch
from torch import Tensor, nn

from core.averaging import build_averaging
from core.config import AveragingConfig, TrainConfig
from core.errors import ConfigError
from core.optim import StepOptimizer, build_optimizer, muon, needs_head
from core.runtime import own_stream
from tests.core.recorded import HostReads, RecordedGraph, let_the_cpu_capture
from tests.core.trainings import forbidden_waits

STEPS = 20
KINDS = ("sgd", "adamw", "nadam", "swats", "muon")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).to(memory_format=torch.channels_last)


def config(name: str, **optim: Any) -> TrainConfig:
    """`swats__tolerance` is `optim.swats.tolerance`; at batch 256 rates are the reference rates."""
    fields = {f"optim.{field.replace('__', '.')}": value for field, value in optim.items()}
    return TrainConfig(batch_size=256).override({"optim.name": name, "schedule.warmup_fraction": 0.0, **fields})


def built(chosen: TrainConfig, *, capturable: bool = False, device: str = "cpu") -> tuple[StepOptimizer, nn.Module]:
    """Create an optimizer, with the network that it trains."""
    model = network().to(device)
    return build_optimizer(chosen, model, STEPS, list(model[5].parameters()), capturable=capturable), model


def trained(chosen: TrainConfig, *, capturable: bool = False) -> tuple[StepOptimizer, nn.Module]:
    """Create an optimizer with its network, and make all steps of `run`."""
    optimizer, model = built(chosen, capturable=capturable)
    run(optimizer, model, range(STEPS))
    return optimizer, model


def set_gradients(model: nn.Module, step: int) -> None:
    """Set random gradients that depend on the step only, in each parameter's layout."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(values)


def advance(optimizer: StepOptimizer, progress: float, factor: float) -> None:
    """Make one step with the current gradients."""
    optimizer.begin_step(progress)
    optimizer.step(torch.tensor(factor) if optimizer.capturable else factor)
    optimizer.end_step(factor)


def run(optimizer: StepOptimizer, model: nn.Module, steps: Iterable[int], total: int = STEPS) -> None:
    """Make steps with a decreasing factor; an epoch is 5 steps."""
    for step in steps:
        set_gradients(model, step)
        advance(optimizer, step / total, 1 - step / total)
        if step % 5 == 4:
            optimizer.end_epoch()


# ---- weight decay


@pytest.mark.parametrize("lr", [1e-4, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_weight_decay_is_equal_for_all_optimizers(name: str, lr: float) -> None:
    optimizer, model = built(config(name, lr=lr, weight_decay=0.01, swats__switch_fraction=0.5))
    before = copy.deepcopy(model)
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        advance(optimizer, step / STEPS, 1 - step / STEPS)
    assert (optimizer.switched_at == 0.5) is (name == "swats")
    shrunk = math.prod(1 - (1 - step / STEPS) * 0.01 for step in range(STEPS))
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        expected = then * shrunk if then.ndim >= 2 else then
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=0)


# ---- torch's own, and timm's


def by_hand(name: str, model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    """torch's optimizer in its plain form with its own weight decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay / lr},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), foreach=False, fused=False)
    return torch.optim.NAdam(groups, lr=lr, betas=(0.8, 0.95), decoupled_weight_decay=True, foreach=False)


def run_reference(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    lr: float,
    decay: float = 0.0,
    grad_clip: float | None = None,
) -> None:
    """Make the steps of `run` with torch's optimizer, after clipping and decoupled decay."""
    for step in range(STEPS):
        set_gradients(model, step)
        factor = 1 - step / STEPS
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip, foreach=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter *= 1 - factor * decay
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()


@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "nadam"])
def test_adaptive_optimizers_match_torch(name: str, grad_clip: float | None) -> None:
    theirs = network()
    _, ours = trained(config(name, lr=0.02, weight_decay=0.01, beta1=0.8, beta2=0.95, grad_clip=grad_clip))
    run_reference(by_hand(name, theirs, 0.02, 0.01), theirs, lr=0.02, grad_clip=grad_clip)
    assert_same(ours, theirs)


@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True), (0.0, False)])
def test_sgd_matches_torch_with_decoupled_decay(momentum: float, nesterov: bool, grad_clip: float | None) -> None:
    theirs = network()
    chosen = config("sgd", lr=0.1, weight_decay=0.01, momentum=momentum, nesterov=nesterov, grad_clip=grad_clip)
    _, ours = trained(chosen)
    reference = torch.optim.SGD(
        theirs.parameters(), momentum=momentum, nesterov=nesterov and momentum > 0, lr=1.0, foreach=False, fused=False
    )
    run_reference(reference, theirs, lr=0.1, decay=0.01, grad_clip=grad_clip)
    assert_same(ours, theirs)


def test_adamw_without_decay_matches_adam() -> None:
    theirs = network()
    _, ours = trained(config("adamw", lr=0.02, weight_decay=0.0))
    run_reference(torch.optim.Adam(theirs.parameters(), lr=1.0, foreach=False, fused=False), theirs, lr=0.02)
    assert_same(ours, theirs)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_matches_timm_with_decoupled_decay(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = network()
    monkeypatch.setattr(muon, "_DTYPE", torch.float32)
    exact = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    _, ours = trained(config("muon", lr=0.02, weight_decay=0.01, momentum=0.8, nesterov=nesterov))
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": [theirs[0].weight]}, {"params": [theirs[5].weight, *vectors], "use_fallback": True}]
    reference = timm.optim.Muon(groups, lr=1.0, momentum=0.8, nesterov=nesterov, betas=(0.9, 0.999))
    run_reference(reference, theirs, lr=0.02, decay=0.01)
    assert_same(ours, theirs)


def test_muons_first_step_orthogonalizes_the_gradient() -> None:
    """The update is UVᵀ of the gradient's UΣVᵀ, times 0.2 √max(out, in) of Liu et al."""
    optimizer, model = built(config("muon", lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False))
    before = model[0].weight.detach().clone()
    set_gradients(model, 0)
    assert model[0].weight.grad is not None
    left, _, right = torch.linalg.svd(model[0].weight.grad.flatten(1), full_matrices=False)
    advance(optimizer, 0.0, 1.0)
    moved = (before - model[0].weight).flatten(1) / (0.1 * 0.2 * 27**0.5)
    # Five Newton-Schulz steps in bfloat16 leave singular values between 0.7 and 1.2 (Jordan et al.).
    aligned = left.T @ moved @ right.T
    assert ((aligned.diagonal() > 0.6) & (aligned.diagonal() < 1.3)).all()
    assert (aligned - aligned.diagonal().diag()).abs().max() < 0.1


# ---- fine-tuning


@pytest.mark.parametrize("name", KINDS)
def test_the_backbone_has_its_own_rate(name: str) -> None:
    fields: dict[str, Any] = {"weight_decay": 0.01, "swats__switch_fraction": 0.5}
    model, slow, fast = (
        trained(config(name, **fields, **more))[1]
        for more in ({"lr": 0.01, "backbone_lr_scale": 0.1}, {"lr": 0.001}, {"lr": 0.01})
    )
    for at, (one, low, high) in enumerate(zip(model.parameters(), slow.parameters(), fast.parameters(), strict=True)):
        torch.testing.assert_close(one, high if at >= 4 else low, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_head_is_trained_at_first(name: str) -> None:
    optimizer, model = built(config(name, weight_decay=0.01, head_only_fraction=0.5, swats__switch_fraction=0.75))
    before = copy.deepcopy(model)
    images = torch.randn(4, 3, 8, 8)
    for step in range(STEPS):
        if step == STEPS // 2:
            assert torch.equal(model[0].weight, before[0].weight)
            assert torch.equal(model[1].bias, before[1].bias)
            assert not torch.equal(model[5].weight, before[5].weight)
        optimizer.begin_step(step / STEPS)
        optimizer.zero_grad()
        model(images).square().sum().backward()
        assert (model[0].weight.grad is None) is (step < STEPS // 2)
        optimizer.step(1.0)
        optimizer.end_step(1.0)
    assert not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [({}, False), ({"backbone_lr_scale": 0.1}, True), ({"head_only_fraction": 0.1}, True), ({"name": "muon"}, True)],
)
def test_needs_head_depends_on_the_configuration(fields: dict[str, Any], needed: bool) -> None:
    assert (
        needs_head(TrainConfig().override({f"optim.{name}": value for name, value in fields.items()}).optim) is needed
    )


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


# ---- every optimizer


@pytest.mark.parametrize("name", KINDS)
def test_the_learning_rate_is_the_peak_times_the_factor(name: str) -> None:
    optimizer, model = built(config(name, lr_scale=2.0))
    peak = 0.2 if name == "sgd" else 2e-3
    assert optimizer.lr == pytest.approx(peak)
    set_gradients(model, 0)
    advance(optimizer, 0.0, 0.25)
    assert optimizer.lr == pytest.approx(peak / 4)


def test_clipping_limits_the_norm_of_all_gradients() -> None:
    optimizer, model = built(config("sgd", grad_clip=0.5))
    set_gradients(model, 0)
    advance(optimizer, 0.0, 1.0)
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(0.5, rel=1e-5)
    model[5].bias.grad.fill_(float("inf"))
    advance(optimizer, 0.0, 1.0)  # the loop detects divergence


@pytest.mark.parametrize("name", KINDS)
def test_parameters_without_gradients_are_not_changed(name: str) -> None:
    model = network()
    model[0].weight.requires_grad_(False)  # frozen
    before = copy.deepcopy(model)
    optimizer = build_optimizer(config(name, weight_decay=0.1), model, STEPS)
    for step in range(STEPS):
        set_gradients(model, step)
        model[0].weight.grad = None
        model[5].weight.grad = None  # not part of this step
        advance(optimizer, step / STEPS, 1.0)
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[5].weight, before[5].weight)
    assert not torch.equal(model[5].bias, before[5].bias)


@pytest.mark.parametrize("name", KINDS)
def test_a_network_of_matrices_only_trains(name: str) -> None:
    model = nn.Linear(3, 2, bias=False)
    run(build_optimizer(config(name), model, STEPS), model, range(STEPS))
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("name", KINDS)
def test_gradients_in_another_memory_order_are_refused_or_paired_by_index(name: str) -> None:
    """torch's fused kernels would pair them by their place in memory."""
    optimizer, model = built(config(name))
    theirs = copy.deepcopy(model)
    set_gradients(model, 0)
    filters = model[0].weight  # channels_last
    assert filters.grad is not None
    filters.grad = filters.grad.contiguous()
    if name == "nadam":
        advance(optimizer, 0.0, 1.0)
        run(build_optimizer(config(name), theirs, STEPS), theirs, [0])
        assert_same(model, theirs)
    else:
        with pytest.raises(ConfigError, match=r"^optim\.name: .* strides of 0\.weight .* set it to nadam"):
            advance(optimizer, 0.0, 1.0)


def test_memory_order_is_checked_again_when_the_backbone_is_unfrozen() -> None:
    optimizer, model = built(config("adamw", head_only_fraction=0.5))
    run(optimizer, model, range(STEPS // 2))
    optimizer.begin_step(0.5)
    set_gradients(model, 0)
    model[0].weight.grad = model[0].weight.grad.contiguous()
    with pytest.raises(ConfigError, match=r"0\.weight"):
        optimizer.step(1.0)


@pytest.mark.parametrize("shape", [(8, 1, 3, 3), (8, 4, 1, 1)])
def test_strides_of_sides_of_one_element_are_free(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(shape).to(memory_format=torch.channels_last))
    optimizer = build_optimizer(config("adamw"), model, STEPS)
    model.weight.grad = torch.ones(shape)
    assert model.weight.grad.stride() != model.weight.stride()
    advance(optimizer, 0.0, 1.0)


def test_a_weight_that_is_part_of_a_larger_tensor_is_refused() -> None:
    """Its gradient is contiguous, and fused kernels would change the elements between its own."""
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    optimizer = build_optimizer(config("sgd"), model, STEPS)
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(ConfigError, match=r"strides of weight are \(12, 2\)"):
        advance(optimizer, 0.0, 1.0)


def test_zero_grad_clears_or_zeroes() -> None:
    optimizer, model = built(config("adamw"))
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


RESUMED = [
    *[(name, {}) for name in KINDS],
    ("swats", {"swats__switch": "criterion", "swats__tolerance": 1.0}),
    ("sgd", {"momentum": 0.0}),
]


def resumed(chosen: TrainConfig, stop: int, forms: tuple[bool, bool]) -> tuple[StepOptimizer, nn.Module]:
    """Stop a run and resume it from a file; each half may be capturable."""
    first, first_model = built(chosen, capturable=forms[0])
    run(first, first_model, range(stop))
    file = io.BytesIO()
    torch.save((first_model.state_dict(), first.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)

    optimizer, model = built(chosen, capturable=forms[1])
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.lr == first.lr
    run(optimizer, model, range(stop, STEPS))
    return optimizer, model


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("stop", [2, 5, 12])
@pytest.mark.parametrize(("name", "fields"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(
    name: str, fields: dict[str, Any], stop: int, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_cpu_capture(monkeypatch)
    chosen = config(name, weight_decay=0.01, grad_clip=3.0, **fields)
    whole, whole_model = trained(chosen, capturable=capturable)
    optimizer, model = resumed(chosen, stop, (capturable, capturable))
    for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (optimizer.switched_at, optimizer.sgd_lr, optimizer.lr) == (whole.switched_at, whole.sgd_lr, whole.lr)
    assert (whole.switched_at is not None) is (name == "swats")


@pytest.mark.parametrize("forms", [(False, True), (True, False)])
@pytest.mark.parametrize(("name", "fields"), RESUMED)
def test_states_can_be_exchanged_between_captured_and_plain_runs(
    name: str, fields: dict[str, Any], forms: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_cpu_capture(monkeypatch)
    chosen = config(name, weight_decay=0.01, **fields)
    whole, whole_model = trained(chosen)
    optimizer, model = resumed(chosen, 7, forms)
    for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=rounding(name))
    assert (optimizer.switched_at, optimizer.lr) == (whole.switched_at, pytest.approx(whole.lr, rel=1e-6))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["nadam"])
def test_cpu_counters_return_to_the_cpu(name: str, capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading counters on the device would wait in each step."""
    let_the_cpu_capture(monkeypatch)
    optimizer, model = built(config(name), capturable=capturable)
    run(optimizer, model, range(2))
    state = optimizer.state_dict()
    moved: list[str] = []

    class Elsewhere(torch.Tensor):
        def cpu(self) -> Tensor:  # type: ignore[override]
            moved.append("step")
            return self.as_subclass(Tensor)

    for moment in state["moments"].values():
        for counter in {"step", "mu_product"} & moment.keys():
            moment[counter] = moment[counter].as_subclass(Elsewhere)
    expected = sum(len({"step", "mu_product"} & moment.keys()) for moment in state["moments"].values())
    optimizer.load_state_dict(state)
    assert expected > 0
    assert len(moved) == (0 if capturable else expected)


def test_loading_copies_the_state() -> None:
    optimizer, model = built(config("sgd"))
    run(optimizer, model, range(3))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other, other_model = built(config("sgd"))
    other.load_state_dict(state)
    run(other, other_model, range(3))
    assert all(
        torch.equal(state["moments"][i]["momentum_buffer"], before["moments"][i]["momentum_buffer"])
        for i in before["moments"]
    )


# Not NAdam, which keeps counters on the CPU unless capturable. Recording covers the capturable form.
@pytest.mark.parametrize(
    ("name", "switch"),
    [("sgd", "fraction"), ("adamw", "fraction"), ("swats", "fraction"), ("swats", "criterion"), ("muon", "fraction")],
)
def test_a_step_does_not_synchronize(name: str, switch: str) -> None:
    optimizer, model = built(config(name, grad_clip=1.0, swats__switch=switch))
    for step in range(STEPS):
        set_gradients(model, step)
        with HostReads():
            advance(optimizer, step / STEPS, 1.0)


# ---- captured steps

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"nesterov": False}),
    "sgd with nesterov": ("sgd", {}),
    "sgd without momentum": ("sgd", {"momentum": 0.0}),
    "adamw": ("adamw", {}),
    "nadam": ("nadam", {}),
    "muon": ("muon", {"nesterov": False}),
    "muon with nesterov": ("muon", {}),
    "swats by fraction": ("swats", {"swats__switch_fraction": 0.5}),
    "swats by criterion": ("swats", {"swats__switch": "criterion", "swats__tolerance": 2e-4}),  # met at step 5
    "clipped": ("adamw", {"grad_clip": 1.0}),
    "slow backbone": ("adamw", {"backbone_lr_scale": 0.1}),
    "head first": ("adamw", {"head_only_fraction": 0.3}),
    "head first with sgd": ("sgd", {"head_only_fraction": 0.3}),
}
PHASES = {"swats by fraction": 2, "swats by criterion": 3, "head first": 2, "head first with sgd": 2}
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def rounding(kind: str) -> float:
    """Tolerance of captured weights, which move by up to 0.05.

    Captured, NAdam's bias corrections are float32, so the first 1 − β₂ᵗ has a relative error of 6e-5.
    """
    return {"nadam": 1e-5}.get(kind, 1e-6)


def factor_at(step: int) -> float:
    """Factor with a warm-up from 0."""
    return step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / (STEPS - 4))) / 2


def set_gradients_in_place(model: nn.Module, step: int) -> None:
    """Like `set_gradients`, in the same memory for captured steps."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(values)


def trajectory(
    name: str, *, capturable: bool, capture: Capture | None = None, device: str = "cpu"
) -> tuple[list[Tensor], dict[Hashable, Callable[[], None]]]:
    """Return weights, EMA and SWATS's projected rate after each step as a flat tensor, and the captures.

    The second step of each phase is captured.
    """
    kind, fields = RUNS[name]
    chosen = config(kind, lr_scale=3.0, weight_decay=0.01, **fields).override({"schedule.warmup_fraction": 0.1})
    optimizer, model = built(chosen, capturable=capturable, device=device)
    averaging = build_averaging(AveragingConfig(name="ema", half_life_fraction=0.1), model, STEPS, 4)
    assert averaging is not None
    factor, weight = torch.zeros((), device=device), torch.zeros((), device=device)
    states: list[Tensor] = []
    seen: Counter[Hashable] = Counter()
    replays: dict[Hashable, Callable[[], None]] = {}
    for step in range(STEPS):
        optimizer.begin_step(step / STEPS)
        set_gradients_in_place(model, step)
        numbers = factor_at(step), averaging.next_weight()
        for tensor, number in zip((factor, weight), numbers, strict=True):
            tensor.fill_(number)
        given = (factor, weight) if capturable else numbers

        def device_half(given: Any = given) -> None:
            optimizer.step(given[0])
            averaging.update(given[1])

        seen[optimizer.phase] += 1
        if optimizer.phase in replays:
            replays[optimizer.phase]()
        elif capture is None or seen[optimizer.phase] == 1:
            device_half()
        else:
            replays[optimizer.phase] = capture(device_half)
        optimizer.end_step(numbers[0])
        averaging.end_update()
        if step % 5 == 4:
            optimizer.end_epoch()
        state = [t.detach().flatten() for m in (model, averaging.module) for t in m.parameters()]
        state += [t.float().flatten() for t in (optimizer.state_dict().get("projection") or {}).values()]
        states.append(torch.cat(state))
    return states, replays


@pytest.mark.parametrize("name", RUNS)
def test_a_replayed_step_equals_the_eager_one_bitwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_the_cpu_capture(monkeypatch)
    recorded, replays = trajectory(name, capturable=True, capture=RecordedGraph.capture)
    eager, _ = trajectory(name, capturable=True)
    assert len(replays) == PHASES.get(name, 1)
    for step, (one, other) in enumerate(zip(recorded, eager, strict=True)):
        assert torch.equal(one, other), step


@pytest.mark.parametrize("name", RUNS)
def test_a_tensor_factor_matches_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within float32 precision, see `rounding`."""
    let_the_cpu_capture(monkeypatch)
    of_tensors, _ = trajectory(name, capturable=True)
    of_numbers, _ = trajectory(name, capturable=False)
    for one, other in zip(of_tensors, of_numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=rounding(RUNS[name][0]))


@pytest.mark.parametrize("name", RUNS)
def test_the_phase_distinguishes_steps_with_other_operations(name: str) -> None:
    kind, fields = RUNS[name]
    optimizer, model = built(config(kind, **fields).override({"schedule.warmup_fraction": 0.1}))
    phases: dict[Hashable, None] = {}
    for step in range(STEPS):
        set_gradients(model, step)
        advance(optimizer, step / STEPS, 1.0)
        phases[optimizer.phase] = None
        if step % 5 == 4:
            optimizer.end_epoch()
    assert len(phases) == PHASES.get(name, 1)


@pytest.mark.parametrize("name", RUNS)
def test_moments_is_the_maximum_number_of_state_tensors(name: str) -> None:
    kind, fields = RUNS[name]
    optimizer, model = built(config(kind, **fields))
    held = 0
    for step in range(STEPS):
        set_gradients(model, step)
        advance(optimizer, step / STEPS, 1.0)
        moments = optimizer.state_dict()["moments"].values()
        values = [v for moment in moments for v in moment.values() if isinstance(v, Tensor) and v.ndim > 0]
        held = max(held, sum(v.numel() for v in values))
    said = optimizer.moments * sum(parameter.numel() for parameter in model.parameters())
    assert held <= said if kind == "muon" else held == said


def test_a_tensor_factor_is_refused_unless_capturable() -> None:
    optimizer, model = built(config("sgd"))
    assert not optimizer.capturable
    set_gradients(model, 0)
    with pytest.raises(TypeError, match="not capturable"):
        optimizer.step(torch.tensor(1.0))


def cuda_capture(function: Callable[[], None]) -> Callable[[], None]:
    """Like `RecordedGraph.capture`; the first replay is the step itself."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    graph.replay()
    return graph.replay


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_on_cuda_a_captured_step_equals_the_eager_one(name: str) -> None:
    with own_stream(torch.device("cuda", 0)):
        captured, replays = trajectory(name, capturable=True, capture=cuda_capture, device="cuda")
        eager, _ = trajectory(name, capturable=True, device="cuda")
        of_numbers, _ = trajectory(name, capturable=False, device="cuda")
    assert len(replays) == PHASES.get(name, 1)
    for one, other, third in zip(captured, eager, of_numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one, third, rtol=1e-5, atol=rounding(RUNS[name][0]))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_on_cuda_a_step_does_not_synchronize(name: str, capturable: bool) -> None:
    kind, fields = RUNS[name]
    optimizer, model = built(config(kind, **({"grad_clip": 1.0} | fields)), capturable=capturable, device="cuda")
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    averaging = build_averaging(AveragingConfig(name="ema"), model, STEPS, 4)
    assert averaging is not None
    factor, weight = torch.ones((), device="cuda"), torch.full((), 0.1, device="cuda")
    with forbidden_waits(torch.device("cuda", 0)):
        for step in range(STEPS):
            optimizer.begin_step(step / STEPS)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.requires_grad else None
            optimizer.step(factor if capturable else 1.0)
            averaging.update(weight if capturable else 0.1)
            optimizer.end_step(1.0)
            averaging.end_update()


# ---- SWATS at a fraction of the run


def test_swats_is_adamw_then_sgd_at_its_reference_rate() -> None:
    swats, ours = built(config("swats", lr_scale=2.0, weight_decay=0.01, swats__switch_fraction=0.5))
    adamw, theirs = built(config("adamw", lr_scale=2.0, weight_decay=0.01))
    run(swats, ours, range(10))
    run(adamw, theirs, range(10))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert swats.switched_at is None
    assert swats.sgd_lr is None
    sgd = build_optimizer(config("sgd", lr_scale=2.0, weight_decay=0.01), theirs, STEPS)
    run(swats, ours, range(10, STEPS))
    run(sgd, theirs, range(10, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert swats.switched_at == 0.5
    assert swats.sgd_lr == pytest.approx(0.2)
    assert swats.lr == pytest.approx(0.2 / STEPS)


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_an_absolute_rate_is_converted_to_its_scale(batch_size: int) -> None:
    scaled = config("swats", lr_scale=0.3).override({"batch_size": batch_size})
    absolute = scaled.override({"optim.lr": scaled.optim.peak_lr(batch_size)})
    rates = [trained(chosen)[0].sgd_lr for chosen in (scaled, absolute)]
    expected = config("sgd", lr_scale=0.3).override({"batch_size": batch_size}).optim.peak_lr(batch_size)
    assert rates == pytest.approx([expected, expected])


def test_a_run_too_short_to_switch_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_optimizer(config("swats", swats__switch_fraction=0.9), network(), 10)
        assert not caplog.records
        build_optimizer(config("swats", swats__switch_fraction=0.95), network(), 10)
    assert "ends before the switch" in caplog.text


# ---- SWATS by the criterion


class Algorithm1:
    """Algorithm 1 of Keskar and Socher 2017 in its notation, for one vector and a constant rate.

    Adam's ε is outside the corrected root, as in torch. `judged` is added: the criterion waits for the warm-up.
    """

    def __init__(self, alpha: float, beta1: float, beta2: float, tolerance: float) -> None:
        self.alpha, self.beta1, self.beta2, self.tolerance = alpha, beta1, beta2, tolerance
        self.phase, self.k, self.m, self.a, self.lambda_, self.v = "Adam", 0, 0.0, 0.0, 0.0, 0.0
        self.big_lambda: float | None = None

    def step(self, w: Tensor, g: Tensor, judged: bool) -> Tensor:
        beta1, beta2 = self.beta1, self.beta2
        self.k += 1
        if self.phase == "SGD":
            self.v = beta1 * self.v + g
            return w - (1 - beta1) * self.big_lambda * self.v
        self.m = beta1 * self.m + (1 - beta1) * g
        self.a = beta2 * self.a + (1 - beta2) * g**2
        m_hat, a_hat = self.m / (1 - beta1**self.k), self.a / (1 - beta2**self.k)
        p = -self.alpha * m_hat / (a_hat.sqrt() + 1e-8)
        if p @ g != 0:
            gamma = ((p @ p) / -(p @ g)).item()
            self.lambda_ = beta2 * self.lambda_ + (1 - beta2) * gamma
            settled = self.lambda_ / (1 - beta2**self.k)
            if judged and self.k > 1 and abs(settled - gamma) < self.tolerance:
                self.phase, self.v, self.big_lambda = "SGD", 0.0, settled
        return w + p


class Weights(nn.Module):
    """A float64 vector, stored as a matrix and a vector to use both parameter groups."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(values[:4].clone().view(2, 2))
        self.vector = nn.Parameter(values[4:].clone())

    def flat(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.vector]).detach()

    def set_gradient(self, gradient: Tensor) -> None:
        self.matrix.grad = gradient[:4].clone().view(2, 2)
        self.vector.grad = gradient[4:].clone()


CURVATURE = torch.tensor([1.0, 3.0, 0.3, 10.0, 2.0, 0.1], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0], dtype=torch.float64)


def criterion(**fields: Any) -> TrainConfig:
    return config("swats", swats__switch="criterion", **{"weight_decay": 0.0, "nesterov": False, **fields})


def built_on_weights(chosen: TrainConfig) -> tuple[StepOptimizer, Weights]:
    model = Weights(START)
    return build_optimizer(chosen, model, STEPS), model


def test_swats_matches_algorithm_1_on_a_quadratic() -> None:
    steps = 300
    paper = Algorithm1(alpha=0.05, beta1=0.9, beta2=0.99, tolerance=3e-3)
    model = Weights(START)
    chosen = criterion(lr=0.05, beta1=0.9, beta2=0.99, momentum=0.9, swats__tolerance=3e-3)
    optimizer = build_optimizer(chosen.override({"schedule.warmup_fraction": 0.1}), model, steps)
    w, phases = START, []
    for step in range(steps):
        w = paper.step(w, CURVATURE * w, judged=step >= 30)
        model.set_gradient(CURVATURE * model.flat())
        advance(optimizer, step / steps, 1.0)
        optimizer.end_epoch()  # epochs of one step, so that it may switch at once
        torch.testing.assert_close(model.flat(), w, rtol=1e-9, atol=1e-12)
        phases.append(paper.phase)
    switch = phases.index("SGD")
    assert 30 < switch < 250  # neither at the beginning nor at the end
    assert optimizer.switched_at == (switch + 1) / steps
    assert optimizer.sgd_lr == pytest.approx(0.1 * paper.big_lambda, rel=1e-9)


def test_the_projected_rate_of_a_constant_gradient() -> None:
    """Adam moves every weight by lr × sign(g), so γ = lr² n / (lr Σ|g|) is constant."""
    gradient = torch.tensor([1.0, -2.0, 0.5, 4.0, -1.0, 3.5], dtype=torch.float64)
    optimizer, model = built_on_weights(criterion(lr=0.01, momentum=0.8, swats__tolerance=1e-6))
    switched = follow(optimizer, model, lambda _: gradient, factor=lambda step: 1 - step / STEPS)
    assert switched == 5
    assert optimizer.sgd_lr == pytest.approx((1 - 0.8) * 0.01 / 2, rel=1e-6)
    assert optimizer.lr == pytest.approx(optimizer.sgd_lr / STEPS)


def follow(
    optimizer: StepOptimizer,
    model: Weights,
    gradient: Callable[[int], Tensor],
    factor: Callable[[int], float] = lambda _: 1.0,
) -> int | None:
    """Make steps in epochs of 5; return the first step of SGD."""
    for step in range(STEPS):
        model.set_gradient(gradient(step))
        advance(optimizer, step / STEPS, factor(step))
        if step % 5 == 4:
            optimizer.end_epoch()
    return None if optimizer.switched_at is None else round(optimizer.switched_at * STEPS)


@pytest.mark.parametrize(("warmup_fraction", "switched"), [(0.0, 5), (0.2, 5), (0.25, 10), (0.3, 10), (0.5, 15)])
def test_the_criterion_is_not_tested_during_the_warmup(warmup_fraction: float, switched: int) -> None:
    chosen = criterion(lr=0.01, swats__tolerance=1e-6).override({"schedule.warmup_fraction": warmup_fraction})
    optimizer, model = built_on_weights(chosen)
    assert follow(optimizer, model, lambda _: torch.ones(6, dtype=torch.float64)) == switched


def test_sgd_uses_the_rate_of_the_first_step_that_met_the_criterion() -> None:
    """Met at the second step with γ = lr / 1; later steps have another rate."""
    optimizer, model = built_on_weights(criterion(lr=0.01, momentum=0.0, swats__tolerance=1e-6))
    follow(optimizer, model, lambda step: torch.full((6,), 1.0 if step < 2 else 1.5, dtype=torch.float64))
    assert optimizer.sgd_lr == pytest.approx(0.01, rel=1e-5)


def test_an_estimate_that_is_not_positive_never_switches() -> None:
    """With β₂ = 0, λ is γ and every step meets the criterion except for its sign.

    The gradient is opposite to the momentum from the second step on, so γ is negative.
    """
    optimizer, model = built_on_weights(criterion(lr=0.01, beta2=0.0, swats__tolerance=1e-6))
    turn = torch.full((6,), -1e-3, dtype=torch.float64)
    assert follow(optimizer, model, lambda step: -1000 * turn if step == 0 else turn) is None


def test_a_step_orthogonal_to_its_gradient_keeps_the_average() -> None:
    """pᵀg = 0 if the gradient is 0, and the paper then keeps λ."""
    optimizer, model = built_on_weights(criterion(lr=0.01, swats__tolerance=1e-12))
    model.set_gradient(torch.ones(6, dtype=torch.float64))
    advance(optimizer, 0.0, 1.0)
    before = optimizer.state_dict()["projection"]["average"].clone()
    model.set_gradient(torch.zeros(6, dtype=torch.float64))
    advance(optimizer, 0.1, 1.0)
    assert optimizer.state_dict()["projection"]["average"] == before > 0


def test_the_papers_tolerance_is_used() -> None:
    """On a quadratic the projected rate changes by more than 1e-9 in every step."""
    optimizer, model = built_on_weights(criterion(lr=0.05))
    follow(optimizer, model, lambda _: CURVATURE * model.flat())
    assert optimizer.switched_at is None
