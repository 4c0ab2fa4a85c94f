"""What `core.loop` costs over a bare PyTorch loop of the same steps (`bare_loop.py`): at most 1.05 times its seconds.

Both train the same network on the digits from the same seeds, in turn, in one process, and must end with the same
losses; both include building the network and the optimizer. The network and the augmentation are the same objects' on
both sides: their speed is not the question here, the loop's is.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from bare_loop import train as train_bare
from common import finish, machine, parser, positive, spread, table

from core.augment import Augment
from core.config import TrainConfig
from core.data import Splits, load_dataset, split
from core.loop import train
from core.models import build_model
from core.runtime import derive_seed, isolated_rng, make_generator, normalize, select_device, synchronize

LIMIT = 1.05  # the promise
CASES = {
    # A small step shows what the loop adds to it; a large one is what people train.
    "small": {"model.widths": (16, 32), "model.blocks": (1, 1), "batch_size": 64},
    "large": {"model.widths": (64, 128), "model.blocks": (1, 1), "batch_size": 128},
}


def run_core(config: TrainConfig, splits: Splits, device: torch.device) -> tuple[float, ...]:
    """The last epoch's training loss, validation loss and validation accuracy, of `core.loop`."""
    last = train(config, splits, device=device).history[-1]
    assert last.raw is not None
    return last.train_loss, last.raw.loss, last.raw.accuracy


def run_bare(config: TrainConfig, splits: Splits, device: torch.device) -> tuple[float, ...]:
    """The same of the bare loop."""
    with isolated_rng(device):
        torch.manual_seed(derive_seed(config.seed, "init"))
        _, channels, height, width = splits.images.shape
        model = build_model(
            config.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        )
        return train_bare(
            model,
            splits.images,
            splits.labels,
            splits.train,
            splits.val,
            augment=Augment(config.augment, splits.mean, splits.std, device),
            prepare=partial(normalize, mean=splits.mean, std=splits.std),
            generator=lambda epoch: make_generator(device, config.seed, "epoch", epoch),
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.optim.peak_lr(config.batch_size),
            decay=config.optim.weight_decay,
            warmup=config.schedule.warmup_fraction,
            warmup_start=config.schedule.warmup_start,
            smoothing=config.loss.smoothing,
            bf16=device.type == "cuda",
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=positive, default=10, help="epochs of each training")
    options.add_argument("--device", help="cpu, cuda or cuda:N; the first GPU where there is one")
    options.add_argument("--threads", type=positive, help="torch's threads; its own choice where left out")
    arguments = options.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    described = machine()
    device = select_device(arguments.device)
    base = TrainConfig(epochs=arguments.epochs).override({"optim.name": "adamw", "loss.smoothing": 0.1})
    splits = split(load_dataset(base.data), base.data).to(device)

    measured: dict[str, dict[str, object]] = {}
    rows = []
    for name, fields in CASES.items():
        config = base.override(dict(fields))
        seconds: dict[str, list[float]] = {"core": [], "bare": []}
        losses: dict[str, tuple[float, ...]] = {}
        sides = [("core", run_core), ("bare", run_bare)]
        warm_up = config.override({"epochs": 1})
        for _, run in sides:
            run(warm_up, splits, device)
        for repeat in range(arguments.repeats):
            for side, run in sides if repeat % 2 == 0 else reversed(sides):
                synchronize(device)
                started = time.perf_counter()
                losses[side] = run(config, splits, device)
                synchronize(device)
                seconds[side].append(time.perf_counter() - started)
        # Each pair ran side by side, so a neighbour's load falls on both; the median pair is the verdict.
        ratios = [core / bare for core, bare in zip(seconds["core"], seconds["bare"], strict=True)]
        if device.type == "cpu":
            assert losses["core"][0] == losses["bare"][0], f"not the same training: {losses}"
        same = all(abs(a - b) <= 1e-4 * max(abs(b), 1e-3) for a, b in zip(losses["core"], losses["bare"], strict=True))
        rows.append(
            [
                name,
                spread(seconds["core"], 2),
                spread(seconds["bare"], 2),
                spread(ratios, 3),
                f"{losses['core'][0]:.6f} / {losses['core'][1]:.6f}",
                f"{losses['bare'][0]:.6f} / {losses['bare'][1]:.6f}" + ("" if same else "  DIFFERENT"),
            ]
        )
        measured[name] = {"seconds": seconds, "ratios": ratios, "losses": losses, "config": config.model_dump()}
    header = ["case", "core.loop, s", "bare loop, s", "ratio", "losses (train / val)", "bare losses"]
    print(table(header, rows))
    print(f"\nmedian ratios against the promised {LIMIT}: ", end="")
    print(", ".join(f"{name} {statistics.median(found['ratios']):.3f}" for name, found in measured.items()))  # type: ignore[call-overload]
    finish("loop", arguments.json, described, epochs=arguments.epochs, measured=measured)


if __name__ == "__main__":
    main()
