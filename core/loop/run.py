"""`train`: epoch after epoch of steps, judged, remembered, and saved.

The randomness of an epoch depends on the seed and the epoch's number alone, so a training that goes on from a
checkpoint is the one that was never interrupted, and no generator's state has to be saved: bitwise on a CPU, and on
CUDA as far as its kernels add in one order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from core import metrics
from core.augment import Augment, alternating_flips, size_at
from core.averaging import build_averaging, recalibrate
from core.checkpoint import Checkpoints, load_checkpoint
from core.config import TrainConfig
from core.data import Splits
from core.errors import CheckpointError, ConfigError, DivergedError
from core.feed import open_feed
from core.loop.divergence import Divergence
from core.loop.graphs import Capture, CapturedSteps, CudaCapture
from core.loop.memory import batch_that_fits, micro_batch_that_fits
from core.loop.results import EpochMetrics, TrainResult
from core.loop.step import Batch, TrainStep, batch_sizes
from core.losses import Criterion
from core.metrics import Scores
from core.models import build_model, check_smaller_images, compiled, head_parameters
from core.optim import build_optimizer, needs_head
from core.runtime import (
    autocast,
    clock,
    compute_dtype,
    derive_seed,
    free_memory,
    isolated_rng,
    make_generator,
    normalize,
    own_stream,
    seed_global,
)
from core.sampling import epoch_length, epoch_order, repeats
from core.schedule import factor, reductions
from core.tta import predict_logits

logger = logging.getLogger(__name__)

# Images of one forward pass without gradients: large enough to fill a GPU, small enough for 224² on a small one.
EVALUATION_BATCH = 512
# Of a training's time, how much saving checkpoints may take. A kill then costs at most an epoch, or the time of twenty
# saves where that is longer. The smallest of networks, saved in 4 ms after an epoch of 0.14 s, is saved every epoch.
CHECKPOINT_SHARE = 0.05


@dataclass(frozen=True)
class Execution:
    """How a training is run. It computes the same, but for the order of sums, and for what batch norm sees where a
    probe divides batches."""

    streamed: bool | None = None
    """Whether images are sent to the device batch by batch; None: where they do not lie there."""
    capture: Capture | None = None
    """How steps are captured, unless `precision.cuda_graphs` is false; None: as CUDA graphs on CUDA, and elsewhere not
    at all."""
    probe: bool | None = None
    """Whether one step is tried before the training, and batches that do not fit the memory are divided; None: on CUDA,
    since a CPU's memory gives way long before its allocator does."""


def train(
    config: TrainConfig,
    splits: Splits,
    *,
    device: torch.device,
    on_epoch_end: Callable[[EpochMetrics], None] | None = None,
    on_resume: Callable[[tuple[EpochMetrics, ...]], None] | None = None,
    resume_from: Path | None = None,
    checkpoint_to: Path | None = None,
    checkpoint_at: Container[int] = (),
    checkpoint_at_end: bool = False,
    on_checkpoint: Callable[[Path], None] | None = None,
    stop_after: int | None = None,
    metric: str = "accuracy",
    execution: Execution = Execution(),
) -> TrainResult:
    """Trains from the first epoch, or from a checkpoint, to the last.

    Args:
        on_epoch_end: called after every epoch. What it raises ends the training and goes through. A KeyboardInterrupt
            leaves a checkpoint of that epoch first; what else it raises leaves none.
        on_resume: called once with the history of a checkpoint before going on from it.
        resume_from: a checkpoint of the same configuration; a path without a file begins anew.
        checkpoint_to: where to save one after the first epoch, and then after an epoch whenever saving would have taken
            no more than `CHECKPOINT_SHARE` of the time since the last, or that was five minutes ago.
        checkpoint_at: epochs after which one is always saved, once `on_epoch_end` has returned.
        checkpoint_at_end: saves one after the last epoch too: gone on from, it is the finished training.
        on_checkpoint: called with its path after each checkpoint is whole and in place.
        stop_after: ends after this epoch, on the schedule of the whole run.
        metric: what early stopping watches; one of `core.metrics.METRICS`.
        execution: how it is run.

    Raises:
        ConfigError: the data and the network do not fit each other, or a step cannot be captured.
        torch.OutOfMemoryError: not even a small part of a batch fits the device's memory; on a CPU a RuntimeError.
        DivergedError: a loss of an epoch, in training or validation, is not finite, or long far above a guess's.
        CheckpointError: the checkpoint is torn or damaged, or of another configuration, metric, or data set.
        OSError: the disk is full, or gone. The checkpoint before is still there, whole.
    """
    with isolated_rng(device), own_stream(device), Run(config, splits, device, metric, execution) as run:
        if resume_from is not None and resume_from.exists():
            run.load(load_checkpoint(resume_from, device), resume_from)
            if on_resume is not None:
                on_resume(tuple(run.history))
        last_epoch = min(stop_after or config.epochs, config.epochs)
        checkpoints = None
        if checkpoint_to is not None:
            checkpoints = Checkpoints(checkpoint_to, run.state, on_saved=on_checkpoint, share=CHECKPOINT_SHARE)
        while len(run.history) < last_epoch and not run.ran_out_of_patience():
            now = run.epoch(final=len(run.history) + 1 == last_epoch)
            if on_epoch_end is not None:
                with _saving_what_is_interrupted(checkpoints):
                    on_epoch_end(now)
            if checkpoints is not None and (now.epoch in checkpoint_at or checkpoints.due):
                checkpoints.save()
        if checkpoints is not None and checkpoint_at_end:
            checkpoints.save()
        return run.result()


@contextlib.contextmanager
def _saving_what_is_interrupted(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Where a person interrupts at the end of an epoch, which is whole, that epoch is not to be trained again."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoints is not None:
            checkpoints.save()
        raise


def seconds_per_epoch(config: TrainConfig, splits: Splits, *, device: torch.device, steps: int = 3) -> float:
    """How long one epoch of training and validation takes on this device, from a few timed steps.

    They are launched kernel by kernel, and not compiled, also where a training would be faster by that.
    """
    plain = config.override({"precision.compile": False, "precision.cuda_graphs": False})
    with isolated_rng(device), own_stream(device), Run(plain, splits, device) as run:
        # The run's last steps: its images are whole and no layer waits any more.
        run.step_count = max(0, run.total_steps - steps - 2)
        sizes: list[int] = []
        batches = run.batches(epoch=1)
        run.step(next(batches))  # pays for start-up
        started = clock(device)
        for batch in batches:
            run.step(batch)
            sizes.append(len(batch))
            if len(sizes) == steps:
                break
        if not sizes:  # an epoch of one batch: time it again
            batch = next(run.batches(epoch=2))
            run.step(batch)
            sizes.append(len(batch))
        training_s = (clock(device) - started) * run.visits / sum(sizes)
        started = clock(device)
        probe = splits.val[: 4 * max(sizes)]
        if len(probe):
            run.logits(run.model, probe)
        validation_s = (clock(device) - started) * len(splits.val) / max(len(probe), 1)
    return training_s + validation_s * (2 if config.averaging.name == "ema" else 1)


class Run:
    """One training in flight."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        device: torch.device,
        metric: str = "accuracy",
        execution: Execution = Execution(),
    ) -> None:
        if len(splits.train) < 2:
            raise ConfigError(f"{len(splits.train)} training image(s): batch norm needs at least 2")
        if config.schedule.name == "plateau" and not len(splits.val):
            raise ConfigError(
                "schedule.name: plateau waits for a better validation score, and there are no validation images"
            )
        self.config, self.device, self.metric = config, device, metric
        self.maximize = metrics.METRICS[metric] == "maximize"
        self.splits = splits.on(device)
        self.feed = open_feed(splits.images, device, streamed=execution.streamed)
        seed_global(device, config.seed, "init")
        self.num_classes = len(splits.classes)
        _, channels, height, width = splits.images.shape
        self.model = build_model(
            config.model, num_classes=self.num_classes, in_channels=channels, image_size=(height, width)
        ).to(device)  # build_model laid it out in channels_last
        self.train_labels = self.splits.labels[self.splits.train]
        self.train_counts = torch.bincount(self.train_labels, minlength=self.num_classes)
        self.visits = epoch_length(self.train_labels, config.sampling)
        self.total_steps = len(batch_sizes(self.visits, config.batch_size)) * config.epochs
        self.prepare = partial(normalize, mean=splits.mean, std=splits.std)
        self.autocast = partial(autocast, config.precision.autocast, device)
        self.generator = torch.Generator(device)
        self.evaluation_batch = EVALUATION_BATCH
        self._graphs_fit = True
        self._captures = config.precision.cuda_graphs and (execution.capture is not None or device.type == "cuda")
        self.one_step = self._build_step()
        val_labels = self.splits.labels[self.splits.val]
        self.divergence = Divergence(config, self.one_step.criterion, self.train_counts, val_labels)
        if execution.probe or (execution.probe is None and device.type == "cuda"):
            self._fit_memory()
        if self._captures and self.optimizer.capturable and self._graphs_fit:
            capture = execution.capture or CudaCapture([self.generator])
            self.one_step.launch = CapturedSteps(self.one_step.run, capture, device, config.model.name)
        self.step_count = 0
        self.reductions = 0  # how often a plateau schedule has fallen
        self.elapsed_s = 0.0
        self.history: list[EpochMetrics] = []
        self.best: tuple[EpochMetrics, dict[str, Tensor]] | None = None  # under early stopping only
        self.last_logits: Tensor | None = None  # of the last epoch's average, or of its weights where there is none
        self._check_sizes(channels, (height, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the graphs, which the run refers to and which refer to it.

        Left to the collector, their memory would be missing to the next training's probe.
        """
        self.one_step.launch = None

    def _build_step(self) -> TrainStep:
        config, device = self.config, self.device
        head = head_parameters(self.model) if needs_head(config.optim) else ()
        self.optimizer = build_optimizer(config, self.model, self.total_steps, head, capturable=self._captures)
        self.averaging = build_averaging(config.averaging, self.model, self.total_steps, config.epochs)
        if config.precision.compile:
            logger.info("compiling the network, which takes a minute or so where it was not compiled before")
        seen_in = compute_dtype(config.precision.autocast, device)
        return TrainStep(
            config,
            compiled(self.model) if config.precision.compile else self.model,
            augment=Augment(config.augment, self.splits.mean, self.splits.std, device, dtype=seen_in),
            criterion=Criterion(config.loss, self.train_counts),
            optimizer=self.optimizer,
            averaging=self.averaging,
            num_classes=self.num_classes,
            autocast=self.autocast,
            generator=self.generator,
        )

    def _fit_memory(self) -> None:
        """Divides batches where a step on a whole one does not fit the device's memory."""
        largest = max(batch_sizes(self.visits, self.config.batch_size))
        rows = self.splits.train[torch.arange(largest, device=self.device) % len(self.splits.train)]
        self.generator.manual_seed(0)  # an epoch seeds it anew

        def try_step(micro_batch: int | None) -> None:
            self.one_step.micro_batch = micro_batch
            self.one_step.try_memory(self.feed.take(rows), self.splits.labels[rows])

        self.model.train()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device) if cuda else 0
        self.one_step.micro_batch = micro_batch_that_fits(
            try_step, self.model, batch_size=largest, moments=self.optimizer.moments
        )
        if cuda:
            # What a graph holds, nothing else can use: steps of other shapes, and evaluation, need as much beside it.
            needed = torch.cuda.max_memory_allocated(self.device) - held
            self._graphs_fit = self.one_step.micro_batch is None and free_memory(self.device) >= 2 * needed
            if self._captures and not self._graphs_fit:
                logger.info("a step takes %.1f GB, more than half of what is free: it is no CUDA graph", needed / 1e9)
        self.evaluation_batch = batch_that_fits(
            lambda size: self.logits(self.model, rows[torch.arange(size, device=self.device) % len(rows)]),
            batch_size=EVALUATION_BATCH,
        )
        if self.one_step.micro_batch is not None:
            logger.info(
                "batches of %d go through the network %d images at a time, which is what batch norm sees",
                self.config.batch_size,
                self.one_step.micro_batch,
            )

    def _check_sizes(self, channels: int, size: tuple[int, int]) -> None:
        """Refuses a network that cannot take each of the sizes through which images grow."""
        if self.config.augment.start_size_fraction == 1:
            return
        sizes = {size_at(self.config.augment, step / self.total_steps, size) for step in range(self.total_steps)}
        for height, width in sorted(sizes - {size}):
            try:
                images = torch.zeros(2, channels, height, width, device=self.device)
                check_smaller_images(self.model, self.config.model, images)
            except ConfigError as error:
                raise ConfigError(
                    f"augment.start_size_fraction: images grow from {height}×{width} on; raise it ({error})"
                ) from error

    # ---- an epoch

    def epoch(self, *, final: bool) -> EpochMetrics:
        """Trains and judges the next epoch."""
        number = len(self.history) + 1
        started = clock(self.device)
        self.model.train()
        self.one_step.loss_sum.zero_()
        if self.config.schedule.name == "plateau":
            past = [epoch.score(self.metric) for epoch in self.history]
            self.reductions = reductions(self.config.schedule, past, maximize=self.maximize, epochs=self.config.epochs)
        for batch in self.batches(number):
            self.step(batch)
        self.optimizer.end_epoch()
        if self.averaging is not None:
            self.averaging.end_epoch(number)
        train_loss = self.one_step.loss_sum.item() / self.visits
        trained_s = clock(self.device) - started
        if not math.isfinite(train_loss):
            raise _diverged("training", number, train_loss)
        raw, averaged = self._judge(final=final)
        for scores in (raw, averaged):
            if scores is not None and not math.isfinite(scores.loss):
                raise _diverged("validation", number, scores.loss)
        self.elapsed_s += clock(self.device) - started
        now = EpochMetrics(
            epoch=number,
            step=self.step_count,
            lr=self.optimizer.lr,
            train_loss=train_loss,
            raw=raw,
            averaged=averaged,
            averaged_counts=averaged is not None and (final or self._average_caught_up(number)),
            images=self.visits,
            images_per_s=self.visits / trained_s,
            elapsed_s=self.elapsed_s,
            micro_batch=self.one_step.micro_batch,
        )
        self.history.append(now)
        self.divergence.check(self.history)
        self._remember_best(now)
        return now

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The epoch's batches. Seeds all that the epoch draws."""
        self.generator.manual_seed(derive_seed(self.config.seed, "epoch", epoch))
        self.host_generator = make_generator(torch.device("cpu"), self.config.seed, "mix", epoch)
        seed_global(self.device, self.config.seed, "dropout", epoch)
        order = epoch_order(self.train_labels, self.config.sampling, self.generator, self.visits)
        sizes = batch_sizes(self.visits, self.config.batch_size)
        rows = torch.split(self.splits.train[order], sizes)
        labels = torch.split(self.train_labels[order], sizes)
        again: Sequence[Tensor | None] = [None] * len(sizes)
        flips: Sequence[Tensor | None] = [None] * len(sizes)
        if self.config.augment.apply_to == "repeats":
            again = torch.split(repeats(order), sizes)
        if self.config.augment.alternate_flip:
            drawn = make_generator(self.device, self.config.seed, "flips")  # once a run, so the same for every epoch
            first = torch.rand(len(self.train_labels), generator=drawn, device=self.device) < 0.5
            flips = torch.split(alternating_flips(first, epoch)[order], sizes)
        yield from map(Batch, self.feed.batches(rows), labels, again, flips)

    def step(self, batch: Batch) -> None:
        """The run's next step."""
        progress = self.step_count / self.total_steps
        self.one_step(batch, progress, factor(self.config.schedule, progress, self.reductions), self.host_generator)
        self.step_count += 1

    # ---- judging

    def logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        """(M, K) float32 of the images at these rows, which are never augmented."""
        chunks = torch.split(rows, self.evaluation_batch)
        outputs = [
            predict_logits(model, images, prepare=self.prepare, batch_size=len(images), autocast=self.autocast)
            for images in self.feed.batches(chunks)
        ]
        return torch.cat(outputs)

    def _judge(self, *, final: bool) -> tuple[Scores | None, Scores | None]:
        """The validation scores of the weights and of their average, where there are such."""
        val, average = self.splits.val, self._average(final=final)
        if not len(val):
            return None, None
        labels = self.splits.labels[val]
        self.last_logits = self.logits(self.model, val)
        raw = metrics.scores(self.last_logits, labels)
        if average is None:
            return raw, None
        self.last_logits = self.logits(average, val)
        return raw, metrics.scores(self.last_logits, labels)

    def _average(self, *, final: bool) -> nn.Module | None:
        """The averaged network, fit for evaluation.

        SWA's batch norms have to see the training images again before it can be judged, a third of an epoch, so that
        is done once, when the run ends.
        """
        if self.averaging is None or not self.averaging.ready:
            return None
        if self.averaging.needs_recalibration:
            if not final:
                return None
            self._recalibrate(self.averaging.module)
        return self.averaging.module

    def _recalibrate(self, average: nn.Module) -> None:
        """Shows the average the training images, shuffled: sorted by class, a batch's variance would be too small."""
        generator = make_generator(self.device, self.config.seed, "recalibrate")
        order = torch.randperm(len(self.splits.train), generator=generator, device=self.device)
        rows = torch.split(self.splits.train[order], batch_sizes(len(order), self.evaluation_batch))
        with self.autocast():
            recalibrate(average, map(self.prepare, self.feed.batches(rows)))

    def _average_caught_up(self, epoch: int) -> bool:
        return self.averaging is not None and self.averaging.caught_up(epoch)

    # ---- early stopping

    def _remember_best(self, now: EpochMetrics) -> None:
        if self.config.early_stop.patience_fraction is None or now.raw is None:
            return
        sign = 1 if self.maximize else -1
        if self.best is None or sign * now.score(self.metric) > sign * self.best[0].score(self.metric):
            averaged = self.averaging is not None and now.counted(self.metric) is now.averaged
            counted = self.averaging.module if self.averaging is not None and averaged else self.model
            self.best = (now, {name: tensor.clone() for name, tensor in counted.state_dict().items()})

    def ran_out_of_patience(self) -> bool:
        """Whether early stopping ends the run here."""
        patience = self.config.early_stop.patience_fraction
        if patience is None or self.best is None:
            return False
        return len(self.history) - self.best[0].epoch >= max(1, round(patience * self.config.epochs))

    # ---- the end, and going on

    def result(self) -> TrainResult:
        """What is kept: the last epoch's average or weights, or the best epoch's under early stopping."""
        if self.best is not None:
            kept, weights = self.best
            model = copy.deepcopy(self.model)
            model.load_state_dict(weights)
            logits: Tensor | None = self.logits(model, self.splits.val)
        else:
            kept, logits = self.history[-1], self.last_logits
            average = self.averaging.module if self.averaging is not None and self.averaging.ready else None
            model = self.model if average is None else average
        for parameter in model.parameters():
            parameter.grad = None  # as large as the weights, and of no use any more
        return TrainResult(model.eval(), tuple(self.history), kept, logits)

    def state(self) -> dict[str, Any]:
        """All that `load` needs, after an epoch's end.

        The schedule is where the count of steps says, and on a plateau where the history does. Generators are seeded by
        the epoch, and bfloat16 has float32's range, so that there is no scaler of gradients.
        """
        return {
            "identity": self._identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaging": None if self.averaging is None else self.averaging.state_dict(),
            "best": None if self.best is None else {"epoch": self.best[0].epoch, "weights": self.best[1]},
            "last_logits": self.last_logits,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "step_count": self.step_count,
            "elapsed_s": self.elapsed_s,
        }

    @cached_property
    def _identity(self) -> dict[str, str]:
        """What has to be the same for a training to be the same, by the words for it."""
        return {
            "configuration": self.config.model_dump_json(),
            "metric": self.metric,
            "data set or split of it": _digest(self.splits),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Goes back to the state that the file at `path` held.

        Raises:
            CheckpointError: it is another configuration's, of other data, or was judged by another metric.
        """
        for what, ours in self._identity.items():
            if state["identity"][what] != ours:
                raise CheckpointError(f"{path}: belongs to another {what}; delete it to train from the beginning")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaging is not None:
            self.averaging.load_state_dict(state["averaging"])
        self.history = [_restore(row) for row in state["history"]]
        if state["best"] is not None:
            self.best = (self.history[state["best"]["epoch"] - 1], state["best"]["weights"])
        self.last_logits = state["last_logits"]
        self.step_count, self.elapsed_s = state["step_count"], state["elapsed_s"]


def _digest(splits: Splits) -> str:
    """Tells data sets and their splits apart: by labels, rows, and the pixels' statistics, but not pixel by pixel."""
    digest = hashlib.sha256(repr((splits.images.shape, splits.classes, splits.mean, splits.std)).encode())
    for rows in (splits.labels, splits.train, splits.val):
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def _diverged(which: str, epoch: int, loss: float) -> DivergedError:
    return DivergedError(f"the {which} loss of epoch {epoch} is {loss}; a lower optim.lr_scale may help")


def _restore(row: dict[str, Any]) -> EpochMetrics:
    scores = {name: None if row[name] is None else Scores(**row[name]) for name in ("raw", "averaged")}
    return EpochMetrics(**{**row, **scores})
