"""`RecordedGraph` replays like a CUDA graph, and `HostReads` detects synchronization."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.recorded import HostReadError, HostReads, RecordedGraph


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).to(memory_format=torch.channels_last)


# ---- the graph


def test_capturing_runs_the_function_once_and_replaying_does_not_run_python() -> None:
    total, runs = torch.zeros(3), []

    def function() -> None:
        runs.append(1)
        total.add_(1)

    replay = RecordedGraph.capture(function)
    assert total.tolist() == [1, 1, 1]
    replay()
    replay()
    assert total.tolist() == [3, 3, 3]
    assert len(runs) == 1


def test_python_numbers_are_frozen_and_tensors_are_not() -> None:
    out = torch.zeros(2)
    number, tensor = 2.0, torch.tensor(2.0)

    def function() -> None:
        out[0] = torch.ones(()) * number
        out[1] = torch.ones(()) * tensor

    replay = RecordedGraph.capture(function)
    number = 5.0
    tensor.fill_(5.0)
    replay()
    assert out.tolist() == [2.0, 5.0]


def test_branches_are_frozen() -> None:
    value, positive = torch.zeros(()), True

    def function() -> None:
        value.add_(1 if positive else -1)

    replay = RecordedGraph.capture(function)
    positive = False
    replay()
    assert value == 2


def test_results_are_written_to_the_recorded_tensors() -> None:
    source = torch.arange(6.0)
    kept: list[Tensor] = []

    def function() -> None:
        doubled = source * 2
        kept.extend([doubled, doubled.view(2, 3)[1], *torch._foreach_add([source, doubled], 1)])

    replay = RecordedGraph.capture(function)
    source.copy_(torch.arange(6.0) + 10)
    before = list(kept)
    replay()
    assert len(kept) == len(before)
    assert torch.equal(kept[0], source * 2)
    assert torch.equal(kept[1], source[3:] * 2)
    assert torch.equal(kept[2], source + 1)
    assert torch.equal(kept[3], source * 2 + 1)


def test_out_arguments_are_written_again() -> None:
    source, out = torch.ones(3), torch.zeros(3)
    replay = RecordedGraph.capture(lambda: torch.mul(source, 3, out=out))
    source.fill_(2)
    replay()
    assert out.tolist() == [6, 6, 6]


def test_uninitialized_memory_keeps_its_content() -> None:
    """As in a graph: `empty` launches nothing."""
    made: list[Tensor] = []
    replay = RecordedGraph.capture(lambda: made.append(torch.empty(1000)))
    made[0].fill_(7)
    replay()
    assert (made[0] == 7).all()


@pytest.mark.parametrize("own", [False, True])
def test_random_numbers_continue_as_without_a_recording(own: bool) -> None:
    generator = torch.Generator() if own else torch.default_generator
    out = torch.zeros(3, 50)

    def function() -> None:
        out[0] = torch.rand(50, generator=generator)
        out[1].uniform_(generator=generator)
        out[2] = torch.randperm(50, generator=generator)

    expected = []
    generator.manual_seed(0)
    for _ in range(3):
        function()
        expected.append(out.clone())
    generator.manual_seed(0)
    replay = RecordedGraph.capture(function)
    assert torch.equal(out, expected[0])
    for values in expected[1:]:
        replay()
        assert torch.equal(out, values)


def test_dropout_is_redrawn() -> None:
    images, out = torch.ones(1000), torch.zeros(1000)
    replay = RecordedGraph.capture(lambda: out.copy_(F.dropout(images, 0.5)))
    first = out.clone()
    replay()
    assert not torch.equal(out, first)
    assert 400 < (out == 2).sum() < 600


def test_batch_norm_continues_counting() -> None:
    """Operations that write running statistics may not declare it, or also allocate results."""
    norm = nn.BatchNorm2d(3)
    expected = copy.deepcopy(norm)
    images = torch.randn(8, 3, 4, 4)
    replay = RecordedGraph.capture(lambda: norm(images))
    replay()
    expected(images)
    expected(images)
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_a_replayed_training_step_equals_the_eager_one_bitwise(autocast: bool) -> None:
    """Forward with dropout and batch norm, backward, fused AdamW, EMA, with changing inputs and rate."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,))) for _ in range(7)]

    def train(capture: bool) -> list[dict[str, Tensor]]:
        model = network()
        average = copy.deepcopy(model)
        lr, images, labels = torch.tensor(0.0), torch.empty_like(batches[0][0]), torch.empty_like(batches[0][1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits = model(images)
            F.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)

        torch.manual_seed(3)
        run, states = step, []
        for number, (its_images, its_labels) in enumerate(batches):
            images.copy_(its_images)
            labels.copy_(its_labels)
            lr.fill_(0.01 * (number + 1))
            if capture and number == 1:  # the first step creates Adam's state
                run = RecordedGraph.capture(step)
            else:
                run()
            states.append(
                copy.deepcopy(model.state_dict() | {f"average.{k}": v for k, v in average.state_dict().items()})
            )
        return states

    for replayed, eager in zip(train(True), train(False), strict=True):
        for name, tensor in eager.items():
            assert torch.equal(replayed[name], tensor), name


def test_reading_a_value_cannot_be_recorded() -> None:
    value = torch.ones(3)
    with pytest.raises(HostReadError, match="aten::item"):
        RecordedGraph.capture(lambda: value.mul_(value.sum().item()))


# ---- waits

VECTOR = torch.tensor([1.0, -2.0, 3.0])
MASK = VECTOR > 0
COUNTS = torch.tensor([1, 0, 2])
READS: dict[str, Callable[[], object]] = {
    "item": lambda: VECTOR[0].item(),
    "float": lambda: float(VECTOR[0]),
    "bool": lambda: bool(VECTOR[0] > 0),
    "tolist": lambda: VECTOR.tolist(),
    "cpu": lambda: VECTOR.cpu(),
    "numpy": lambda: VECTOR.numpy(),
    "format": lambda: f"{VECTOR[0]:.2f}",
    "index by a tensor's value": lambda: VECTOR[COUNTS[0]],
    "nonzero": lambda: VECTOR.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: VECTOR[MASK],
    "mask assigned to": lambda: VECTOR.clone().index_put_((MASK,), VECTOR[:2]),
    "masked_select": lambda: VECTOR.masked_select(MASK),
    "unique": lambda: torch.unique(VECTOR),
    "unique_consecutive": lambda: torch.unique_consecutive(VECTOR),
    "bincount": lambda: torch.bincount(COUNTS, minlength=5),
    "repeat_interleave": lambda: torch.repeat_interleave(VECTOR, COUNTS),
    "equal": lambda: torch.equal(VECTOR, VECTOR),
    "allclose": lambda: torch.allclose(VECTOR, VECTOR),
    "histc": lambda: torch.histc(VECTOR),
    "inverse": lambda: torch.linalg.inv(torch.eye(2)),
    "index by a list": lambda: VECTOR[[0, 2]],
    "a tensor of a number": lambda: VECTOR + torch.tensor([1.0]),
    "weighted and smoothed": lambda: F.cross_entropy(VECTOR[None], COUNTS[:1], VECTOR, label_smoothing=0.1),
}
FREE: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: (VECTOR * 2 + 1).sum(),
    "index by integers": lambda: VECTOR[torch.zeros(2, dtype=torch.int64)],
    "a mask multiplied": lambda: torch.where(MASK, VECTOR, 0.0),
    "a mask filled": lambda: VECTOR.masked_fill(MASK, 0.0),
    "repeat_interleave of a known size": lambda: torch.repeat_interleave(VECTOR, COUNTS, output_size=3),
    "repeat_interleave by a number": lambda: VECTOR.repeat_interleave(2),
    "another type": lambda: VECTOR.double(),
    "clipping": lambda: torch._foreach_norm([VECTOR, VECTOR]),
    "one-hot by scatter": lambda: torch.zeros(3, 4).scatter_(1, COUNTS[:, None], 1.0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", READS)
def test_host_reads_raise_or_are_listed(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        with pytest.raises(HostReadError, match="the host waits"), HostReads():
            READS[name]()
        with HostReads(raises=False) as reads:
            READS[name]()
    assert reads.found


@pytest.mark.parametrize("name", FREE)
def test_other_operations_are_allowed(name: str) -> None:
    with HostReads() as reads:
        FREE[name]()
    assert reads.found == []


def test_host_reads_are_listed_with_their_callers() -> None:
    with HostReads(raises=False) as reads:
        VECTOR[MASK]
    assert reads.found == ["aten::index > aten::nonzero"]


def test_errors_of_the_body_propagate() -> None:
    with pytest.raises(ZeroDivisionError), HostReads():
        _ = VECTOR.sum().item() / 0


def test_host_reads_in_the_backward_pass_are_detected() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(lambda gradient: gradient * gradient.sum().item())
    with HostReads(raises=False) as reads:
        weight.square().sum().backward()
    assert len(reads.found) == 1
