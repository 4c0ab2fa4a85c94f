"""What each choice beyond the diaries is worth: accuracy with it and without it, everything else equal.

Each choice is compared with its own control on two real sets: photographs of scenes, and CIFAR-10. A choice that helps
on neither stays out of the shipped spaces; one that helps is theirs to search. Every seed draws other training images,
other test images and other weights, the same for both sides, so that the differences are paired. Trainings of this size
are short, and no case for what needs long ones: what is left out here may help in a space of one's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import finish, machine, mean_and_deviation, parser, positive, table
from trainings import SHARED, Done, Job, RandomCut, accuracy_line, by_name, paired, rows_of, run_all

from core.config import TrainConfig

SETS = {"scenes": ("scenes5k.zip", 6), "cifar10": ("cifar10_jpeg.tar.xz", 10)}

CUTMIX = {"augment.cutmix": 1.0, "augment.mix_off_fraction": 0.8}
SWA = {"averaging.name": "swa"}
DEEP = {"model.blocks": (2, 2, 2), "model.drop_path": 0.1}
# choice -> (its control, the choice itself); both over `base`.
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Muon for AdamW": ({}, {"optim.name": "muon"}),
    "Muon for AdamW, lr × 3": ({"optim.lr_scale": 12.0}, {"optim.name": "muon", "optim.lr_scale": 12.0}),
    "alternating flip": ({}, {"augment.alternate_flip": True}),
    "TrivialAugment for two RandAugment ops": ({"augment.ops": 2}, {"augment.policy": "trivialaugment"}),
    "TrivialAugment for none": ({}, {"augment.policy": "trivialaugment"}),
    "AutoAugment for none": ({}, {"augment.policy": "autoaugment_cifar10"}),
    "BCE for cross-entropy, under CutMix": (CUTMIX, {**CUTMIX, "loss.name": "bce"}),
    "focal, gamma 1": ({}, {"loss.name": "focal", "loss.gamma": 1.0}),
    "drop path alike for linear": (DEEP, {**DEEP, "model.drop_path_shape": "uniform"}),
    "anti-aliased steps": ({}, {"model.anti_alias": True}),
    "SWA for none": ({}, SWA),
    "SWA at 0.2 of the peak rate for 0.5": (SWA, {**SWA, "averaging.swa_factor": 0.2}),
    "EMA for none": ({}, {"averaging.name": "ema"}),
    "growing from half the side": ({}, {"augment.start_size_fraction": 0.5, "augment.full_size_from_fraction": 0.7}),
}


def base(epochs: int) -> TrainConfig:
    """A small residual network, AdamW, crop and flip."""
    return TrainConfig().override(
        {
            "epochs": epochs,
            "batch_size": 64,
            "model.widths": (16, 32, 64),
            "model.blocks": (1, 1, 1),
            "optim.lr_scale": 4.0,
            "loss.smoothing": 0.1,
        }
    )


def _key(changes: dict[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in sorted(changes.items())) or "base"


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED, help="the folder of the two archives")
    options.add_argument("--images", type=positive, default=1800, help="training images of each set")
    options.add_argument("--judged", type=positive, default=2000, help="test images of each set")
    options.add_argument("--epochs", type=positive, default=12)
    options.add_argument("--side", type=positive, default=32, help="pixels that images are resized to")
    options.add_argument("--only", nargs="*", help="words that a choice's name must hold one of")
    options.add_argument("--workers", type=positive, default=2, help="trainings at a time, one thread each")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    chosen = {
        name: sides
        for name, sides in CHOICES.items()
        if not arguments.only or any(word.lower() in name.lower() for word in arguments.only)
    }
    sides = {_key(changes): changes for pair in chosen.values() for changes in pair}  # a control may serve several
    with tempfile.TemporaryDirectory() as cache:
        jobs = [
            Job(
                f"{where}: {key}",
                seed,
                base(arguments.epochs).override({**changes, "seed": seed}),
                RandomCut(
                    arguments.data / archive,
                    (arguments.images // classes,) * classes,
                    arguments.judged // classes,
                    seed,
                    arguments.side,
                    Path(cache),
                ),
            )
            for where, (archive, classes) in SETS.items()
            for seed in range(arguments.repeats)
            for key, changes in sides.items()
        ]
        done = by_name(run_all(jobs, workers=arguments.workers, said=accuracy_line))
    rows = []
    for name, (control, choice) in chosen.items():
        for where in SETS:
            without, with_it = (done[f"{where}: {_key(changes)}"] for changes in (control, choice))
            rows.append([name, where, _accuracy(without), _accuracy(with_it), _gain(with_it, without)])
    print("\n" + table(["choice", "set", "without", "with", "better by (95 %)"], rows))
    finish("choices", arguments.json, described, trainings=[row for group in done.values() for row in rows_of(group)])


def _accuracy(group: list[Done]) -> str:
    return mean_and_deviation([one.accuracy for one in group])


def _gain(ours: list[Done], theirs: list[Done]) -> str:
    return paired([one.accuracy for one in ours], [one.accuracy for one in theirs])


if __name__ == "__main__":
    main()
