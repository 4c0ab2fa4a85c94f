"""A probe (`optim.name: logistic`): the network stays as it was pretrained, and only its classifier is fitted.

The features, the classifier's input, are computed once per image without augmentation. Multinomial logistic regression
with an L2 penalty, chosen by cross-validation on the training images, classifies the standardized features. Its weights
go into the network's own classifier, with the standardization folded into them: the result is an ordinary network.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import ConfigError
from core.models import probed_classifier
from core.runtime import evaluating

Array = NDArray[np.float32]

# Inverse penalties (scikit-learn's C) in ascending order: the first fits are the fastest.
PENALTIES: tuple[float, ...] = tuple(10.0 ** (step / 2) for step in range(-10, 5))
# Of each cross-validation.
FOLDS = 5
# The held-out loss has one minimum along the penalties, up to noise.
WORSE_PENALTIES = 2
# For C where no class has a second training image to be judged by: scikit-learn's default.
UNTESTED_PENALTY = 1.0
MOST_ITERATIONS = 1000
# A fit with its cross-validation, in fits of random features: 48 to 80 on 500 and 1,500 images of 1,280 features.
TIMED_FITS = 60
# Networks whose features are remembered: folds and replicates of a study alternate between a few.
REMEMBERED = 4


class Features:
    """The inputs of a network's classifier, remembered for the same images and weights.

    Raises:
        ConfigError: The network has no classifier that is one linear layer.
    """

    def __init__(self, model: nn.Module, name: str, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self.model, self.classifier = model, probed_classifier(model)
        self._name, self._autocast = name, autocast

    def of(self, images: Tensor) -> Tensor:
        """Return the features of normalized images (N, C, H, W) in evaluation mode: (N, F)."""
        caught: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            with evaluating(self.model), torch.inference_mode(), self._autocast():
                self.model(images)
        finally:
            hook.remove()
        return caught[0]

    def of_rows(
        self,
        rows: Tensor,
        images: Tensor,
        batches: Sequence[Tensor],
        *,
        read: Callable[[Sequence[Tensor]], Iterable[Tensor]],
        key: tuple[Hashable, ...],
    ) -> Tensor:
        """Return the features of all images, (N, F) float32 on the CPU; those that are not needed may be empty.

        The batches are always the same, since the sums in a layer may depend on the size of a batch.

        Args:
            rows: indices of the needed images.
            images: (N, C, H, W).
            batches: indices of all images, in batches.
            read: yields batches as the network's input.
            key: everything that the features depend on, apart from images and weights.
        """
        known = _remembered((self._fingerprint(), *key), images)
        needed = torch.zeros(len(images), dtype=torch.bool)
        needed[rows] = True
        missing = [batch for batch in batches if needed[batch].any() and int(batch[0]) not in known.done]
        for batch, inputs in zip(missing, read(missing), strict=True):
            features = self.of(inputs).float().cpu()
            if not known.features.numel():
                known.features = torch.zeros(len(images), features.shape[1])
            known.features[batch] = features
            known.done.add(int(batch[0]))
        return known.features

    def _fingerprint(self) -> str:
        """Hash of the network without its classifier."""
        digest = hashlib.sha256(self._name.encode())
        own = {id(tensor) for tensor in self.classifier.parameters()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in own:
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


@dataclass
class _Remembered:
    """Features of some batches of a data set."""

    key: tuple[object, ...]
    images: weakref.ref[Tensor]
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    done: set[int] = field(default_factory=set)
    """First rows of the batches."""


_memory: deque[_Remembered] = deque(maxlen=REMEMBERED)


def _remembered(key: tuple[object, ...], images: Tensor) -> _Remembered:
    """The features computed before with this key, of the same tensor of images; at first none."""
    for known in tuple(_memory):
        if known.images() is None:
            _memory.remove(known)
        elif known.images() is images and known.key == key:
            return known
    _memory.append(_Remembered(key, weakref.ref(images)))
    return _memory[-1]


# The classifier ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """Logits of features x (F,) are weight · x + bias."""

    weight: NDArray[np.float64]
    """(K, F)."""
    bias: NDArray[np.float64]
    """(K,)."""
    penalty: float
    """The chosen inverse penalty C of the standardized features."""
    iterations: int
    """Of the last fit."""

    def write_to(self, classifier: nn.Linear) -> None:
        """Replace the weights of a linear layer."""
        with torch.no_grad():
            for parameter, values in ((classifier.weight, self.weight), (classifier.bias, self.bias)):
                parameter.copy_(torch.from_numpy(values))


def fit(
    features: Array,
    labels: NDArray[np.int64],
    together: NDArray[np.int64] | None,
    *,
    class_weights: NDArray[np.float64],
    seed: int,
) -> Fitted:
    """Fit a logistic regression whose penalty has the least held-out loss.

    Args:
        features: (N, F) of the training images.
        labels: (N,) below K.
        together: (N,) equal for images that cross-validation keeps on one side; None if all may be parted.
        class_weights: (K,) weight of an image by its class, in the fit and in the held-out loss.
        seed: of the cross-validation's parts.

    Raises:
        ConfigError: a class has no image.
    """
    missing = sorted(set(range(len(class_weights))) - set(labels.tolist()))
    if missing:
        raise ConfigError(
            f"optim.name: logistic needs a training image of every class, and class {missing[0]} has none"
        )
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std[std == 0] = 1.0  # a constant feature
    standard = ((features - mean) / std).astype(np.float32)
    weights = class_weights[labels]
    with _quiet_on_threads(torch.get_num_threads()):
        penalty = _best_penalty(standard, labels, together, weights, seed)
        model = _model(penalty).fit(standard, labels, sample_weight=weights)
    weight, bias = _linear(model)
    weight = weight / std
    return Fitted(weight, bias - weight @ mean, penalty, int(model.n_iter_.max()))


@contextlib.contextmanager
def _quiet_on_threads(threads: int) -> Iterator[None]:
    """Limit the threads of matrix products. A fit that did not converge is judged by its held-out loss as it is."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def fit_seconds(labels: NDArray[np.int64], features: int) -> float:
    """Estimate the time of `fit` from a fit of random features, (N, `features`)."""
    drawn = np.random.default_rng(0).standard_normal((len(labels), features), dtype=np.float32)
    with _quiet_on_threads(torch.get_num_threads()):
        began = time.perf_counter()
        _model(UNTESTED_PENALTY).fit(drawn, labels)
        return (time.perf_counter() - began) * TIMED_FITS


def _best_penalty(
    features: Array,
    labels: NDArray[np.int64],
    together: NDArray[np.int64] | None,
    weights: NDArray[np.float64],
    seed: int,
) -> float:
    """The inverse penalty with the least mean held-out loss."""
    parts = list(_parts(labels, together, seed))
    if not parts:
        return UNTESTED_PENALTY
    models = [_model(PENALTIES[0]) for _ in parts]
    losses: list[float] = []
    for penalty in PENALTIES:
        total: float = 0.0
        for model, (train, held_out) in zip(models, parts, strict=True):
            model.set_params(C=penalty)  # continues from the last penalty's weights
            model.fit(features[train], labels[train], sample_weight=weights[train])
            weight, bias = _linear(model)
            logits = torch.from_numpy(features[held_out] @ weight.T + bias)
            columns = torch.from_numpy(np.searchsorted(model.classes_, labels[held_out]))
            each = F.cross_entropy(logits, columns, reduction="none")
            total += float(np.dot(each.numpy(), weights[held_out]))
        losses.append(total)
        if len(losses) - 1 - int(np.argmin(losses)) >= WORSE_PENALTIES:
            break
    return PENALTIES[int(np.argmin(losses))]


def _model(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    return LogisticRegression(C=penalty, max_iter=MOST_ITERATIONS, warm_start=True)


def _linear(model: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (K, F) and biases (K,) of the logits of a fitted model's classes."""
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(model.classes_) == 2:  # the model has the difference of their logits
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _parts(
    labels: NDArray[np.int64], together: NDArray[np.int64] | None, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to train on and rows to judge by. An image is judged only by a model that has seen its class."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    units = len(labels) if together is None else len(np.unique(together))
    count = min(FOLDS, int(np.bincount(labels).max()), units)
    if count < 2:
        return
    kind: Any = StratifiedKFold if units == len(labels) else StratifiedGroupKFold
    draw = kind(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # rare classes are in some parts only
        divided = list(draw.split(labels, labels, None if units == len(labels) else together))
    for train, held_out in divided:
        seen = held_out[np.isin(labels[held_out], labels[train])]
        if len(seen) and len(np.unique(labels[train])) > 1:
            yield train, seen
