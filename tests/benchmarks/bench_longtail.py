"""Which remedy for imbalance works: macro-F1 on a long-tailed CIFAR-10, everything else equal.

The set is cut as Cui et al. 2019 cut theirs (arXiv 1901.05555): an exponential profile from the largest class to the
smallest, the ratio between them 100, judged on balanced test images. What is compared are the remedies of the
imbalanced diary (focal loss, the weighted sampler, copies with more augmentation) with those of the literature
(balanced softmax, deferred re-weighting), on one network, one schedule and one number of steps: where copies make an
epoch longer, there are fewer of them. Every seed draws another cut and other weights, the same for all remedies.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import finish, machine, mean_and_deviation, parser, positive, table
from trainings import SHARED, Job, RandomCut, by_name, paired, rows_of, run_all

from core.config import TrainConfig

REMEDIES: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "focal, gamma 2": {"loss.name": "focal"},
    "weighted sampler": {"sampling.name": "balanced"},
    "copies up to 12, six operations": {
        "sampling.oversample": 12, "augment.policy": "six", "augment.ops": 1, "augment.strength": 0.5,
    },
    "inverse class weights": {"loss.class_weights": "inverse"},
    "deferred re-weighting": {"loss.class_weights": "effective", "loss.class_weights_from_fraction": 0.8},
    "balanced softmax": {"loss.logit_adjustment": 1.0},
}  # fmt: skip
REFERENCE = "balanced softmax"


def profile(largest: int, ratio: float, classes: int) -> tuple[int, ...]:
    """Images of each class: from `largest` down to `largest` / `ratio`, in equal factors."""
    return tuple(round(largest * ratio ** (-index / (classes - 1))) for index in range(classes))


def base(epochs: int) -> TrainConfig:
    """A small residual network and SGD, as the literature has it, at a size for two cores."""
    return TrainConfig().override(
        {
            "epochs": epochs,
            "batch_size": 64,
            "model.widths": (16, 32, 64),
            "model.blocks": (1, 1, 1),
            "optim.name": "sgd",
            "optim.lr_scale": 2.0,
            "optim.weight_decay": 2e-5,
        }
    )


def equal_steps(config: TrainConfig, counts: tuple[int, ...]) -> TrainConfig:
    """The configuration with its epochs cut so that it visits as many images as one without copies."""
    largest, most = max(counts), config.sampling.oversample
    visits = sum(min(most * count, largest) for count in counts)
    return config.override({"epochs": round(config.epochs * sum(counts) / visits)})


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED / "cifar10_jpeg.tar.xz", help="CIFAR-10 in class folders")
    options.add_argument("--largest", type=positive, default=1000, help="training images of the largest class")
    options.add_argument("--ratio", type=positive, default=100, help="the largest class over the smallest")
    options.add_argument("--judged", type=positive, default=500, help="test images of each class")
    options.add_argument("--epochs", type=positive, default=80)
    options.add_argument("--workers", type=positive, default=2, help="trainings at a time, one thread each")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    counts = profile(arguments.largest, arguments.ratio, classes=10)
    print(f"training images a class: {', '.join(map(str, counts))}; {sum(counts)} in all")
    with tempfile.TemporaryDirectory() as cache:
        jobs = [
            Job(
                name,
                seed,
                equal_steps(base(arguments.epochs).override({**changes, "seed": seed}), counts),
                RandomCut(arguments.data, counts, arguments.judged, seed, side=32, cache=Path(cache)),
            )
            for seed in range(arguments.repeats)
            for name, changes in REMEDIES.items()
        ]
        done = run_all(
            jobs,
            workers=arguments.workers,
            said=lambda one: f"{one.name}, seed {one.seed}: macro-F1 {one.macro_f1:.4f}, {one.seconds:.0f} s",
        )
    groups = by_name(done)
    ours = [one.macro_f1 for one in groups[REFERENCE]]
    rows = [
        [
            name,
            mean_and_deviation([one.macro_f1 for one in group]),
            mean_and_deviation([one.accuracy for one in group]),
            "" if name == REFERENCE else paired(ours, [one.macro_f1 for one in group]),
        ]
        for name, group in groups.items()
    ]
    print("\n" + table(["remedy", "macro-F1", "accuracy", f"{REFERENCE} better by (95 %)"], rows))
    finish("longtail", arguments.json, described, counts=counts, trainings=rows_of(done))


if __name__ == "__main__":
    main()
