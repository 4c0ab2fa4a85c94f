"""`train`: the loop over epochs, with validation, early stopping and checkpoints.

Random numbers depend on the seed and the epoch's number only, so a resumed training continues exactly: bitwise on a
CPU, and on CUDA up to the order of sums in its kernels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from core import metrics
from core.augment import Augment, OwnTransform, alternating_flips, mixes, size_at
from core.averaging import ExponentialAveraging, build_averaging, ema_name, recalibrate, validations_per_epoch
from core.calibration import calibrated_loss
from core.checkpoint import Checkpoints, load_checkpoint
from core.config import READING_FIELDS, TrainConfig, is_own
from core.data import Splits
from core.errors import CheckpointError, ConfigError, DivergedError
from core.feed import open_feed
from core.loop.divergence import Divergence
from core.loop.graphs import Capture, CapturedSteps, CudaCapture
from core.loop.memory import (
    SMALLEST_MICRO_BATCH,
    batch_that_fits,
    batches_that_fit,
    error_of_memory,
    free_cache,
    kept_bytes,
    micro_batch_that_fits,
)
from core.loop.probe import Features, fit, fit_seconds
from core.loop.results import EpochMetrics, TrainResult
from core.loop.step import Batch, StepShape, TrainStep, batch_sizes
from core.losses import Criterion, class_weights
from core.metrics import Scores
from core.models import build_model, check_smaller_images, head_parameters, layer_scales
from core.models.compilation import compiled, compiled_if_it_pays, count_trained
from core.optim import build_optimizer, needs_head, try_own
from core.runtime import (
    autocast,
    check_autocast,
    clock,
    compute_dtype,
    free_memory,
    is_out_of_memory,
    isolated_rng,
    keep_freed_memory,
    make_generator,
    normalize,
    own_stream,
    release_freed_memory,
    seed_global,
)
from core.sampling import class_caps, epoch_length, epoch_order, repeats
from core.schedule import factor_of, reductions, saturated_from
from core.seeds import derive_seed
from core.text import count
from core.tta import evaluation_batch, predict_logits

logger = logging.getLogger(__name__)

# Of a step's peak on a CPU: 1.04 (EfficientNet-B0 at 224²) to 1.44 (RegNetY at 224²) of what its backward pass needs.
HOST_BYTES_PER_KEPT_BYTE = 1.25
# Of a training's time for saving checkpoints: a killed process loses at most an epoch or the time of twenty saves.
CHECKPOINT_SHARE = 0.05
# Name of the weights beside their average in `TrainResult.averages`.
_WEIGHTS = "none"
# Of a probe, to estimate its time.
TIMED_IMAGES = 128


@dataclass(frozen=True)
class Execution:
    """How a training is executed. Affects only the order of sums, and batch norm if a probe splits batches."""

    streamed: bool | None = None
    """None streams images that are not on the device."""
    capture: Capture | None = None
    """None captures CUDA graphs on CUDA only. Off if `precision.cuda_graphs` is false."""
    probe: bool | None = None
    """Try a step first, and split batches that do not fit the memory. None: on CUDA only. On a CPU, whose allocator
    hardly ever fails, the memory of a step is predicted from a few images instead."""
    batches_at_once: int | None = None
    """Batches that are augmented together. None chooses it by the number and size of images."""


@dataclass(frozen=True)
class _Course:
    """Progress of a run by its steps: a straight line from one step to the last."""

    last_step: int
    last_progress: float = 1.0
    step: int = 0
    progress: float = 0.0

    def at(self, step: int) -> float:
        """Return the progress, in [0, 1]."""
        return self.progress + (self.last_progress - self.progress) * (
            (step - self.step) / (self.last_step - self.step)
        )

    @property
    def total_steps(self) -> float:
        """Steps of a whole run at this pace."""
        return (self.last_step - self.step) / (self.last_progress - self.progress)


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
    calibrate_at: Container[int] = (),
    stop_after: int | None = None,
    left_s: Callable[[], float] | None = None,
    metric: str = "accuracy",
    averages: Sequence[float] = (),
    execution: Execution = Execution(),
) -> TrainResult:
    """Train from the first epoch, or from a checkpoint, to the last.

    Args:
        splits: images on the device or the host.
        on_epoch_end: its exceptions propagate; a KeyboardInterrupt saves a checkpoint first.
        on_resume: called with the checkpoint's history.
        resume_from: a checkpoint of the same configuration; ignored if it does not exist.
        checkpoint_to: saved as often as `CHECKPOINT_SHARE` permits.
        checkpoint_at: epochs that are always saved, after `on_epoch_end`.
        checkpoint_at_end: always save the last epoch.
        on_checkpoint: called with the path after each save.
        calibrate_at: epochs with `EpochMetrics.calibrated_loss`.
        stop_after: last epoch, on the schedule of the whole run.
        left_s: returns the seconds that are left; None without a limit. Where the remaining epochs do not fit them, at
            the speed of the last one, fewer follow, and the rest of the schedule is compressed into these.
        metric: of early stopping; one of `core.metrics.METRICS`.
        averages: half-lives, as fractions of the run, of EMAs for `TrainResult.averages`, which change nothing else.
        execution: how to execute it.

    Raises:
        ConfigError: the data do not fit the network.
        GraphError: a failed capture left the device unusable in this process.
        torch.OutOfMemoryError: not even a small part of a batch fits the device's memory; on a CPU a RuntimeError.
        DivergedError: a loss is not finite, or stays far above that of uniform predictions.
        CheckpointError: the checkpoint is damaged, lacks an average, or is of another configuration, metric or data.
        OSError: writing failed. The previous checkpoint is intact.
    """
    kind = Probe if config.is_probe else Run
    with isolated_rng(device), own_stream(device), kind(config, splits, device, metric, averages, execution) as run:
        _resume(run, resume_from, on_resume)
        saved = partial(Checkpoints, state=run.state, on_saved=on_checkpoint, share=CHECKPOINT_SHARE)
        checkpoints = None if checkpoint_to is None else saved(checkpoint_to)
        for now in _epochs(run, stop_after, left_s, calibrate_at):
            if on_epoch_end is not None:
                with _saving_on_interrupt(checkpoints):
                    on_epoch_end(now)
            if checkpoints is not None and (now.epoch in checkpoint_at or checkpoints.due):
                checkpoints.save()
        if checkpoints is not None and checkpoint_at_end:
            checkpoints.save()
        return run.result()


def _epochs(
    run: Run, stop_after: int | None, left_s: Callable[[], float] | None, calibrate_at: Container[int]
) -> Iterator[EpochMetrics]:
    """Train epoch by epoch to the planned one, or to the last that fits the time or the patience."""
    planned = min(stop_after or run.epochs, run.epochs)
    while len(run.history) < min(planned, run.last_epoch) and not run.ran_out_of_patience():
        if left_s is not None:
            run.fit_within(left_s(), planned)
        now = run.try_epoch(final=len(run.history) + 1 == min(planned, run.last_epoch))
        yield run.calibrated() if now.epoch in calibrate_at and now.validated else now


def _resume(run: Run, checkpoint: Path | None, on_resume: Callable[[tuple[EpochMetrics, ...]], None] | None) -> None:
    if checkpoint is None or not checkpoint.exists():
        return
    run.load(load_checkpoint(checkpoint, run.device), checkpoint)
    if on_resume is not None:
        on_resume(tuple(run.history))


@contextlib.contextmanager
def _saving_on_interrupt(checkpoints: Checkpoints | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if checkpoints is not None:
            checkpoints.save()
        raise


def try_own_parts(config: TrainConfig, splits: Splits) -> None:
    """Build and try a loss, a transform and an optimizer of the user's own on the CPU.

    Raises:
        ConfigError: one fails.
        UserError: one cannot be imported.
    """
    cpu, image = torch.device("cpu"), splits.images.shape[1:]
    with isolated_rng(cpu):
        if is_own(config.loss.name):
            counts = torch.bincount(splits.labels[splits.train].cpu(), minlength=len(splits.classes))
            Criterion(config.loss, counts, mixes=mixes(config.augment, 0.0))
        if config.augment.name is not None:
            transform = OwnTransform(config.augment, splits.mean, splits.std, cpu)
            transform.check((image[0], image[1], image[2]), torch.float32)
        if is_own(config.optim.name):
            try_own(config.optim)


def seconds_per_epoch(config: TrainConfig, splits: Splits, *, device: torch.device, steps: int = 3) -> float:
    """Estimate the time of an epoch with validation from a few steps without capture.

    A probe has one, whose time is divided among the `epochs` of its configuration.
    """
    if config.is_probe:
        with isolated_rng(device), own_stream(device), Probe(config, splits, device) as one:
            return one.seconds() / config.epochs
    plain = config.override({"precision.compile": False, "precision.cuda_graphs": False})
    with isolated_rng(device), own_stream(device), Run(plain, splits, device) as run:
        run.batches_at_once = 1  # each step then includes its own augmentation
        # In the last steps images have their full size and no layer is frozen.
        run.step_count = max(0, run.total_steps - steps - 2)
        sizes: list[int] = []
        batches = run.batches(epoch=1)
        run.step(next(batches))  # warm-up
        started = clock(device)
        for batch in batches:
            run.step(batch)
            sizes.append(len(batch))
            if len(sizes) == steps:
                break
        if not sizes:  # an epoch of one batch
            batch = next(run.batches(epoch=2))
            run.step(batch)
            sizes.append(len(batch))
        training_s = (clock(device) - started) * run.visits / sum(sizes)
        started = clock(device)
        probe = splits.val[: 4 * max(sizes)]
        if len(probe):
            run.logits(run.model, probe)
        validation_s = (clock(device) - started) * len(splits.val) / max(len(probe), 1)
    return training_s + validation_s * validations_per_epoch(config.averaging)


class _Best(NamedTuple):
    """The best epoch, and copies of its weights."""

    epoch: EpochMetrics
    weights: dict[str, Tensor]
    others: dict[str, dict[str, Tensor]]  # of `TrainResult.averages`

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch.epoch, "weights": self.weights, "others": self.others}


class Run:
    """State of one training."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        device: torch.device,
        metric: str = "accuracy",
        averages: Sequence[float] = (),
        execution: Execution = Execution(),
    ) -> None:
        if len(splits.train) < 2:
            raise ConfigError(f"{len(splits.train)} training image(s): batch norm needs at least 2")
        if config.schedule.name == "plateau" and not len(splits.val):
            raise ConfigError("schedule.name: plateau needs validation images, and there are none")
        if config.loss.smoothing_patience_fraction is not None and not len(splits.val):
            raise ConfigError("loss.smoothing_patience_fraction needs validation images, and there are none")
        check_autocast(config.precision.autocast, device)
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.device, self.metric = config, device, metric
        self.maximize = metrics.METRICS[metric] == "maximize"
        self.splits = splits.on(device)
        self.feed = open_feed(splits.images, device, streamed=execution.streamed)
        seed_global(device, config.seed, "init")
        self.num_classes = len(splits.classes)
        _, channels, height, width = splits.images.shape
        self.image = (channels, height, width)
        self.model = build_model(
            config.model, num_classes=self.num_classes, in_channels=channels, image_size=(height, width)
        ).to(device)  # build_model made it channels_last
        self.train_labels = self.splits.labels[self.splits.train]
        self.train_counts = torch.bincount(self.train_labels, minlength=self.num_classes)
        self.caps = class_caps(self.train_labels, config.sampling, splits.classes)
        self.visits = epoch_length(self.train_labels, config.sampling, self.caps)
        self.batch_sizes = batch_sizes(self.visits, config.batch_size)
        self.total_steps = len(self.batch_sizes) * config.epochs
        self.prepare = partial(normalize, mean=splits.mean, std=splits.std)
        self.autocast = partial(autocast, config.precision.autocast, device)
        self.generator = torch.Generator(device)
        self.evaluation_batch = evaluation_batch(config.model, (height, width), device)
        self.step_count, self.course = 0, _Course(self.total_steps)
        self.reductions = 0  # reductions of a plateau schedule so far
        self.elapsed_s = 0.0
        self.history: list[EpochMetrics] = []
        self.best: _Best | None = None  # with early stopping only
        self.last_logits: Tensor | None = None  # of the last epoch's average, else of its weights
        self.raw_logits: Tensor | None = None  # of the last epoch's weights, if they were validated
        self.averages: dict[str, ExponentialAveraging] = {}  # by name, beside the own one
        self._prepare_steps(averages, execution)

    def _prepare_steps(self, averages: Sequence[float], execution: Execution) -> None:
        config, device, splits = self.config, self.device, self.splits
        seen_in = compute_dtype(config.precision.autocast, device)
        self.augment = Augment(config.augment, splits.mean, splits.std, device, dtype=seen_in)
        self.transform = None
        if config.augment.name is not None:
            self.transform = OwnTransform(config.augment, splits.mean, splits.std, device)
            self.transform.check(self.image, seen_in)
        at_once = execution.batches_at_once or self.augment.batches_at_once(config.batch_size, self.image)
        self.batches_at_once = min(at_once, len(self.batch_sizes))
        """Batches that are augmented together."""
        self._graphs_fit = True
        self._captures = config.precision.cuda_graphs and (execution.capture is not None or device.type == "cuda")
        self.one_step = self._build_step(averages)
        val_labels = self.splits.labels[self.splits.val]
        self.divergence = Divergence(config, self.one_step.criterion, self.train_counts, val_labels)
        if execution.probe or (execution.probe is None and device.type == "cuda"):
            self._fit_memory()
        elif execution.probe is None and self.one_step.network is self.model:  # other shapes compile again
            self._fit_host_memory()
        if self._captures and not self.optimizer.capturable and is_own(config.optim.name):
            logger.warning(
                "optim.name %s: steps of your own optimizer cannot be CUDA graphs: they are launched kernel by kernel",
                config.optim.name,
            )
        if self._captures and self.optimizer.capturable and self._graphs_fit:
            capture = execution.capture or CudaCapture([self.generator])
            self.one_step.launch = CapturedSteps(
                self.one_step.run, capture, device, code_in_step(config), self.remaining, len(self.one_step.averages)
            )
        self._check_sizes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the CUDA graphs: their reference cycle with the run would keep their memory."""
        self.one_step.launch = None

    @property
    def epochs(self) -> int:
        """Number of epochs of the whole run."""
        return self.config.epochs

    @property
    def last_epoch(self) -> int:
        """The epoch at whose end the course is over: of the whole run, unless it was shortened."""
        return self.course.last_step // len(self.batch_sizes)

    def _build_step(self, averages: Sequence[float]) -> TrainStep:
        config = self.config
        head = head_parameters(self.model) if needs_head(config.optim) else ()
        scales = None if config.optim.layer_decay == 1 else layer_scales(self.model, config.optim.layer_decay)
        self.optimizer = build_optimizer(
            config, self.model, self.total_steps, head, layer_scales=scales, capturable=self._captures
        )
        self.averaging = build_averaging(config.averaging, self.model, self.total_steps, config.epochs)
        self.averages = {
            ema_name(each): ExponentialAveraging(each, self.model, self.total_steps, config.epochs) for each in averages
        }
        own = [] if self.averaging is None else [self.averaging]
        return TrainStep(
            config,
            self._network(),
            criterion=Criterion(config.loss, self.train_counts, mixes=mixes(config.augment, 0.0)),
            optimizer=self.optimizer,
            averages=[*own, *self.averages.values()],
            num_classes=self.num_classes,
            autocast=self.autocast,
            generator=self.generator,
        )

    def _network(self) -> Callable[[Tensor], Tensor]:
        """The network of training passes."""
        compilation, frozen_first = self.config.precision.compile, self.config.optim.head_only_fraction > 0
        if compilation == "auto":
            return compiled_if_it_pays(
                self.model,
                self.image,
                images=self.visits * self.config.epochs,
                shapes=len(set(self.batch_sizes)) * len(self._image_sizes) * (1 + frozen_first),
                bytes_per_element=compute_dtype(self.config.precision.autocast, self.device).itemsize,
            )
        if compilation:
            logger.info("compiling the network, which takes about a minute unless it is cached")
            return compiled(self.model)
        return self.model

    def _fit_memory(self) -> None:
        largest, moments = max(self.batch_sizes), self.optimizer.moments
        self.generator.manual_seed(0)  # each epoch seeds it again

        def try_step(micro_batch: int | None, batches: int = 1) -> None:
            self.one_step.micro_batch = micro_batch
            self._try_step(largest, batches)

        self.model.train()
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if cuda else 0
        micro_batch = micro_batch_that_fits(try_step, self.model, batch_size=largest, moments=moments)
        fits = partial(batches_that_fit, partial(try_step, micro_batch), self.model, moments=moments)
        self.batches_at_once = fits(most=self.batches_at_once)
        if cuda:
            self._graphs_fit = micro_batch is None
        if cuda and self._graphs_fit:
            torch.cuda.reset_peak_memory_stats(self.device)  # choosing cuDNN's algorithms needed more
            self.batches_at_once = fits(most=self.batches_at_once)
            # Other steps and evaluation need as much memory as a graph keeps to itself.
            needed = torch.cuda.max_memory_allocated(self.device) - held
            self._graphs_fit = free_memory(self.device) >= 2 * needed
            if self._captures and not self._graphs_fit:
                logger.info(
                    "a step takes %.1f GB, more than half of the free memory: CUDA graphs are off", needed / 1e9
                )
        self.evaluation_batch = batch_that_fits(
            lambda size: self.logits(self.model, self._training_rows(size)), batch_size=self.evaluation_batch
        )
        self._set_micro_batch(micro_batch)

    def _fit_host_memory(self) -> None:
        """Split batches whose passes would take more than the free memory: the system would kill the process."""
        largest, moments = max(self.batch_sizes), self.optimizer.moments
        few = min(largest, SMALLEST_MICRO_BATCH)
        self.generator.manual_seed(0)  # each epoch seeds it again
        self.model.train()
        per_image = HOST_BYTES_PER_KEPT_BYTE * kept_bytes(partial(self._try_step, few), self.model) / few
        fixed = (1 + moments) * sum(parameter.nbytes for parameter in self.model.parameters())
        free = free_memory(self.device)
        if fixed + largest * per_image > free:
            release_freed_memory()
            free = free_memory(self.device)

        def refuse_too_large(micro_batch: int | None) -> None:
            images = micro_batch or largest
            if (needed := fixed + images * per_image) > free:
                raise torch.OutOfMemoryError(
                    f"a step of {count(images, 'image')} takes about {needed / 1e9:.1f} GB of memory, "
                    f"and {free / 1e9:.1f} GB are free"
                )

        micro_batch = micro_batch_that_fits(refuse_too_large, self.model, batch_size=largest, moments=moments)
        self._set_micro_batch(micro_batch)

    def _set_micro_batch(self, micro_batch: int | None) -> None:
        self.one_step.micro_batch = micro_batch
        if micro_batch is not None:
            logger.info(
                "batches of %d go through the network %d images at a time, which is what batch norm sees",
                self.config.batch_size,
                micro_batch,
            )

    @cached_property
    def _image_sizes(self) -> set[tuple[int, int]]:
        """Height and width of the network's inputs over the run."""
        if self.config.augment.start_size_fraction == 1:
            return {self.image[1:]}
        return {
            size_at(self.config.augment, step / self.total_steps, self.image[1:]) for step in range(self.total_steps)
        }

    def _check_sizes(self) -> None:
        for height, width in sorted(self._image_sizes - {self.image[1:]}):
            try:
                images = torch.zeros(2, self.image[0], height, width, device=self.device)
                check_smaller_images(self.model, self.config.model, images)
            except ConfigError as error:
                raise ConfigError(
                    f"augment.start_size_fraction: images grow from {height}×{width} on; raise it ({error})"
                ) from error

    def try_epoch(self, *, final: bool) -> EpochMetrics:
        """Make an `epoch`. An error that may be a lack of memory is an OutOfMemoryError if half a batch works then."""
        error = error_of_memory(partial(self.epoch, final=final))
        if error is None:
            return self.history[-1]
        if is_out_of_memory(error):
            raise error
        self.model.zero_grad(set_to_none=True)
        free_cache()
        half = max((self.one_step.micro_batch or max(self.batch_sizes)) // 2, 2)
        self.one_step.micro_batch = None
        try:
            self._try_step(half)
        except RuntimeError:
            raise error from None
        raise torch.OutOfMemoryError(str(error)) from error

    def _try_step(self, images: int, batches: int = 1) -> None:
        """Augment batches together, and run the passes of one."""
        rows = self._training_rows(images * batches)
        flags = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        draws = self.augment.draw([images] * batches, self.image, self.generator, flips=flags, repeats=flags)
        seen = self.augment.apply(self.feed.take(rows), draws[:])
        self.one_step.try_memory(self._transformed(seen[:images]), self.splits.labels[rows[:images]])

    def _training_rows(self, count: int) -> Tensor:
        return self.splits.train[torch.arange(count, device=self.device) % len(self.splits.train)]

    def epoch(self, *, final: bool) -> EpochMetrics:
        """Train and validate an epoch."""
        number = len(self.history) + 1
        started = clock(self.device)
        self.model.train()
        self.one_step.loss_sum.zero_()
        if self.config.schedule.name == "plateau":
            past = [epoch.score(self.metric) for epoch in self.history]
            self.reductions = reductions(self.config.schedule, past, maximize=self.maximize, epochs=self.config.epochs)
        losses = [epoch.score("nll") for epoch in self.history] if self.config.loss.smoothing_patience_fraction else []
        self.one_step.criterion.saturated = saturated_from(self.config.loss, losses, epochs=self.epochs) is not None
        for batch in self.batches(number):
            self.step(batch)
        self.optimizer.end_epoch()
        scheduled = round(self.course.at(self.step_count) * self.config.epochs)  # the epoch by the schedule
        if self.averaging is not None:
            self.averaging.end_epoch(scheduled)
        train_loss = self.one_step.loss_sum.item() / self.visits
        trained_s = clock(self.device) - started
        if self.config.precision.compile == "auto":
            count_trained(self.model, self.visits)
        if not math.isfinite(train_loss):
            raise _diverged("training", number, train_loss)
        averaged_counts = final or (self.averaging is not None and self.averaging.caught_up(scheduled))
        raw, averaged = self._validate(averaged_counts=averaged_counts, final=final)
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
            averaged_counts=averaged_counts and averaged is not None,
            images=self.visits,
            images_per_s=self.visits / trained_s,
            elapsed_s=self.elapsed_s,
            micro_batch=self.one_step.micro_batch,
        )
        self.history.append(now)
        self.divergence.check(self.history)
        self._remember_best(now)
        return now

    def fit_within(self, seconds: float, planned: int) -> None:
        """Choose the last epoch, at most the planned one, so that the run ends in time by the time of its last epoch.

        The rest of the schedule is compressed into the remaining epochs. At least one follows.
        """
        if not self.history:
            return
        done, before_s = len(self.history), self.history[-2].elapsed_s if len(self.history) > 1 else 0.0
        epoch_s = self.history[-1].elapsed_s - before_s
        last = done + max(1, min(planned - done, int(seconds / epoch_s)))
        if last != min(planned, self.last_epoch):
            step, progress = self.step_count, self.course.at(self.step_count)
            self._take(_Course(last * len(self.batch_sizes), planned / self.epochs, step, progress))

    def _take(self, course: _Course) -> None:
        """Take over a course, and let the averages keep pace."""
        self.course = course
        for average in (self.averaging, *self.averages.values()):
            if average is not None:
                average.follow(course.total_steps)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Seed an epoch's random numbers, and yield its batches."""
        self.generator.manual_seed(derive_seed(self.config.seed, "epoch", epoch))
        self.host_generator = make_generator(torch.device("cpu"), self.config.seed, "mix", epoch)
        seed_global(self.device, self.config.seed, "dropout", epoch)
        order = epoch_order(self.train_labels, self.config.sampling, self.generator, self.visits, self.caps)
        draws = self.augment.draw(
            self.batch_sizes,
            self.image,
            self.generator,
            flips=self._flips(epoch)[order] if self.config.augment.alternate_flip else None,
            repeats=repeats(order) if self.config.augment.apply_to == "repeats" else None,
        )
        labels = iter(torch.split(self.train_labels[order], self.batch_sizes))
        sizes = [self.batch_sizes[chunk] for chunk in self.chunks]
        rows = torch.split(self.splits.train[order], list(map(sum, sizes)))
        for chunk, its_sizes, images in zip(self.chunks, sizes, self.feed.batches(rows), strict=True):
            with self.one_step.section("augment"):
                seen = self.augment.apply(images, draws[chunk])
            yield from map(Batch, map(self._transformed, torch.split(seen, its_sizes)), labels)

    def _transformed(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        with self.one_step.section("augment"):
            return self.transform(images)

    @property
    def chunks(self) -> list[slice]:
        """The batches of an epoch that are augmented together."""
        count, most = len(self.batch_sizes), self.batches_at_once
        return [slice(first, min(first + most, count)) for first in range(0, count, most)]

    def _flips(self, epoch: int) -> Tensor:
        """The training images (n,) bool that are flipped in an epoch, if flips alternate."""
        drawn = make_generator(self.device, self.config.seed, "flips")  # the same in every epoch
        first = torch.rand(len(self.train_labels), generator=drawn, device=self.device) < 0.5
        return alternating_flips(first, epoch)

    def step(self, batch: Batch) -> None:
        """Make the run's next step."""
        progress = self.course.at(self.step_count)
        self.one_step(batch, progress, factor_of(self.config, progress, self.reductions), self.host_generator)
        self.step_count += 1

    def remaining(self, shape: StepShape) -> int:
        """Number of steps of this shape from the present one on, unless an unscheduled phase begins."""

        def is_over(step: int) -> bool:
            progress = self.course.at(step)
            size = self.splits.images.shape[-2:]
            over = self.one_step.shape_at(progress, shape.images, (size[0], size[1])) != shape
            return over or progress >= self.optimizer.phase_end

        # Whatever the progress decides never returns.
        steps = range(self.step_count, self.course.last_step)
        steps = steps[: bisect_left(steps, True, key=is_over)]
        return sum(self.batch_sizes[step % len(self.batch_sizes)] == shape.images for step in steps)

    def logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Return the logits (M, K) float32 of the images at these rows, without augmentation."""
        chunks = torch.split(rows, self.evaluation_batch)
        outputs = [
            predict_logits(model, images, prepare=self.prepare, batch_size=len(images), autocast=self.autocast)
            for images in self.feed.batches(chunks)
        ]
        return torch.cat(outputs)

    def _validate(self, *, averaged_counts: bool, final: bool) -> tuple[Scores | None, Scores | None]:
        """Score the weights, unless only those of their average count, and the average."""
        average = self._average(final=final)
        if not len(self.splits.val):
            return None, None
        raw = self._score(self.model) if average is None or not averaged_counts else None
        self.raw_logits = self.last_logits
        return raw, None if average is None else self._score(average)

    def _score(self, model: nn.Module) -> Scores:
        self.last_logits = self.logits(model, self.splits.val)
        return metrics.scores(self.last_logits, self.splits.labels[self.splits.val])

    def calibrated(self) -> EpochMetrics:
        """Add the calibrated loss to the last epoch, which was validated."""
        now = self.history[-1]
        logits = self.raw_logits if now.counted(self.metric) is now.raw else self.last_logits
        assert logits is not None, "it was validated in this process"
        labels = self.splits.labels[self.splits.val]
        self.history[-1] = dataclasses.replace(now, calibrated_loss=calibrated_loss(logits, labels))
        return self.history[-1]

    def _average(self, *, final: bool) -> nn.Module | None:
        """The average for evaluation; with SWA only at the end, since it is recalibrated first."""
        if self.averaging is None or not self.averaging.ready:
            return None
        if self.averaging.needs_recalibration:
            if not final:
                return None
            self._recalibrate(self.averaging.module)
        return self.averaging.module

    def _recalibrate(self, average: nn.Module) -> None:
        """Recalibrate on shuffled images: sorted by class, the variance of a batch would be too small."""
        generator = make_generator(self.device, self.config.seed, "recalibrate")
        order = torch.randperm(len(self.splits.train), generator=generator, device=self.device)
        together = max(self.evaluation_batch, self.config.batch_size)
        rows = torch.split(self.splits.train[order], batch_sizes(len(order), together))
        with self.autocast():
            recalibrate(average, map(self.prepare, self.feed.batches(rows)))

    def _remember_best(self, now: EpochMetrics) -> None:
        if self.config.early_stop.patience_fraction is None or not now.validated:
            return
        sign = 1 if self.maximize else -1
        if self.best is None or sign * now.score(self.metric) > sign * self.best.epoch.score(self.metric):
            averaged = self.averaging is not None and now.counted(self.metric) is now.averaged
            counted = self.averaging.module if self.averaging is not None and averaged else self.model
            others = {name: _copied(each) for name, each in self._alternatives(counted).items()}
            self.best = _Best(now, _copied(counted), others)

    def ran_out_of_patience(self) -> bool:
        """Return whether early stopping ends the run."""
        patience = self.config.early_stop.patience_fraction
        if patience is None or self.best is None:
            return False
        return len(self.history) - self.best.epoch.epoch >= max(1, round(patience * self.config.epochs))

    def result(self) -> TrainResult:
        """Return the last epoch's average or weights, or with early stopping the best epoch's."""
        if self.best is not None:
            kept, model = self.best.epoch, self._with(self.best.weights)
            others = {name: self._with(weights) for name, weights in self.best.others.items()}
            logits: Tensor | None = self.logits(model, self.splits.val)
        else:
            kept, logits = self.history[-1], self.last_logits
            average = self.averaging.module if self.averaging is not None and self.averaging.ready else None
            model = self.model if average is None else average
            others = self._alternatives(model)
        for each in (model, *others.values()):
            each.eval()
            for parameter in each.parameters():
                parameter.grad = None  # frees as much memory as the weights take
        return TrainResult(model, tuple(self.history), kept, logits, others)

    def _alternatives(self, model: nn.Module) -> dict[str, nn.Module]:
        """The networks of `TrainResult.averages` beside the own one."""
        weights = {_WEIGHTS: self.model} if self.averages and model is not self.model else {}
        return weights | {name: average.module for name, average in self.averages.items()}

    def _with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights)
        return model

    def state(self) -> dict[str, Any]:
        """Return the state. Generators are seeded per epoch, and the schedule follows from the history."""
        return {
            "identity": self._identity,
            "model": self.model.state_dict(),
            "last_logits": self.last_logits,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "step_count": self.step_count,
            "course": dataclasses.astuple(self.course),
            "elapsed_s": self.elapsed_s,
            **self._state_of_steps(),
        }

    def _state_of_steps(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "averaging": None if self.averaging is None else self.averaging.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "best": None if self.best is None else self.best.state(),
        }

    @cached_property
    def _identity(self) -> dict[str, str]:
        return {
            "configuration": self.config.model_dump_json(),
            "metric": self.metric,
            "data set or split of it": _digest(self.splits),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Restore the state of the checkpoint at `path`, or raise CheckpointError if it is of another training."""
        for what, ours in self._identity.items():
            theirs = state["identity"][what]
            if theirs != ours and not (what == "configuration" and _trains_the_same(theirs, ours)):
                raise CheckpointError(f"{path}: belongs to another {what}; delete it to train from the beginning")
        if missing := self.averages.keys() - state.get("averages", {}).keys():
            raise CheckpointError(f"{path}: lacks {', '.join(sorted(missing))}; delete it to train from the beginning")
        self.model.load_state_dict(state["model"])
        self.history = [_restore(row) for row in state["history"]]
        self.last_logits = state["last_logits"]
        self.step_count, self.elapsed_s = state["step_count"], state["elapsed_s"]
        self._take(_Course(*state.get("course", (self.total_steps,))))  # none in checkpoints of 0.1
        self._load_steps(state)

    def _load_steps(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaging is not None:
            self.averaging.load_state_dict(state["averaging"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        if (best := state["best"]) is not None:
            self.best = _Best(self.history[best["epoch"] - 1], best["weights"], best.get("others", {}))


class Probe(Run):
    """State of a probe (`core.loop.probe`): a training of one epoch, whatever `epochs` is."""

    @property
    def epochs(self) -> int:
        return 1

    def __exit__(self, *_: object) -> None:
        """There are no CUDA graphs to release."""

    def _prepare_steps(self, averages: Sequence[float], execution: Execution) -> None:  # noqa: ARG002
        self.averaging = None
        if execution.probe or (execution.probe is None and self.device.type == "cuda"):
            rows = self._training_rows(self.evaluation_batch)
            self.evaluation_batch = batch_that_fits(
                lambda size: self.logits(self.model, rows[:size]), batch_size=self.evaluation_batch
            )
        self.features = Features(self.model, self.config.model.name, self.autocast)

    def seconds(self) -> float:
        """Estimate the time from the features of a few images, and from one fit."""
        images = self.prepare(self.feed.take(self.splits.train[:TIMED_IMAGES]))
        began = [clock(self.device)]
        for _ in range(2):  # the first is a warm-up
            features = self.features.of(images)
            began.append(clock(self.device))
        per_image = (began[2] - began[1]) / len(images)
        images_s = per_image * (len(self.splits.train) + len(self.splits.val))
        return images_s + fit_seconds(self.train_labels.cpu().numpy(), features.shape[1])

    def try_epoch(self, *, final: bool) -> EpochMetrics:
        return self.epoch(final=final)

    def epoch(self, *, final: bool) -> EpochMetrics:  # noqa: ARG002
        """Compute the features, fit the classifier and validate it."""
        started = clock(self.device)
        train, val = self.splits.train.cpu(), self.splits.val.cpu()
        features = self._features(torch.cat([train, val]))
        weights = class_weights(self.config.loss, self.train_counts)
        together = self.splits.together
        fitted = fit(
            features[train].numpy(),
            self.train_labels.cpu().numpy(),
            None if together is None else together[train].numpy(),
            class_weights=np.ones(self.num_classes) if weights is None else weights.double().cpu().numpy(),
            seed=derive_seed(self.config.seed, "probe") % 2**32,
        )
        fitted.write_to(self.features.classifier)
        train_loss = metrics.scores(self._classified(features[train]), self.train_labels).loss
        trained_s = clock(self.device) - started
        raw = None
        if len(val):
            self.last_logits = self.raw_logits = self._classified(features[val])
            raw = metrics.scores(self.last_logits, self.splits.labels[self.splits.val])
        self.step_count = fitted.iterations
        self.elapsed_s += clock(self.device) - started
        now = EpochMetrics(
            epoch=1,
            step=self.step_count,
            lr=0.0,
            train_loss=train_loss,
            raw=raw,
            averaged=None,
            averaged_counts=False,
            images=len(train),
            images_per_s=len(train) / trained_s,
            elapsed_s=self.elapsed_s,
        )
        self.history.append(now)
        return now

    def _features(self, rows: Tensor) -> Tensor:
        """The features (N, F) float32 of all images on the CPU; rows that are not needed may be empty."""
        splits = self.splits
        batches = torch.split(torch.arange(len(splits.images)), self.evaluation_batch)
        size, cast = self.config.model.input_size, self.config.precision.autocast
        by = (splits.mean, splits.std, size, cast, self.device, self.evaluation_batch)
        return self.features.of_rows(
            rows,
            splits.images,
            batches,
            read=lambda batches: map(self.prepare, self.feed.batches([batch.to(self.device) for batch in batches])),
            key=by,
        )

    def _classified(self, features: Tensor) -> Tensor:
        """Logits (M, K) float32 of features (M, F)."""
        with torch.inference_mode(), self.autocast():
            logits: Tensor = self.features.classifier(features.to(self.device))
        return logits.float()

    def _state_of_steps(self) -> dict[str, Any]:
        return {}

    def _load_steps(self, state: dict[str, Any]) -> None:
        """There is nothing but the network."""


def code_in_step(config: TrainConfig) -> str:
    """Return the fields that choose the code of a step, for messages."""
    own = f", loss.name {config.loss.name}" if is_own(config.loss.name) else ""
    return f"model.name {config.model.name}{own}"


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _trains_the_same(theirs: str, ours: str) -> bool:
    """Whether two configurations in JSON differ only by how images are read, by graphs, or by fields that one lacks."""
    irrelevant = {"data": {*READING_FIELDS, "val"}, "precision": {"cuda_graphs"}}
    try:
        a, b = (TrainConfig.model_validate_json(text).model_dump(exclude=irrelevant) for text in (theirs, ours))
    except ValueError:  # of a field that is no more
        return False
    return a == b


def _digest(splits: Splits) -> str:
    """Digest of labels, split and pixel statistics, not of the pixels."""
    digest = hashlib.sha256(repr((splits.images.shape, splits.classes, splits.mean, splits.std)).encode())
    for rows in (splits.labels, splits.train, splits.val):
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def _diverged(which: str, epoch: int, loss: float) -> DivergedError:
    return DivergedError(f"the {which} loss of epoch {epoch} is {loss}; a lower optim.lr_scale may help")


def _restore(row: dict[str, Any]) -> EpochMetrics:
    scores = {name: None if row[name] is None else Scores(**row[name]) for name in ("raw", "averaged")}
    return EpochMetrics(**{**row, **scores})
