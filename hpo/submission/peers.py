"""The configurations beside a winner that an ensemble may include: those with predictions of the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from optuna.trial import TrialState
from torch import Tensor

from core.config import TrainConfig
from hpo.confirmation.result import Confirmation
from hpo.paths import TrainingPaths
from hpo.study import Study
from hpo.submission.evidence import Evidence, of_confirmation, of_training


@dataclass(frozen=True)
class Peer:
    """A configuration, and predictions of its networks on the winner's held-out images."""

    name: str
    """For example `trial 12`."""
    trial: int | None
    """Number; None if no trial has this configuration."""
    config: TrainConfig
    epochs: int
    """Of the training on all images: those that its own training kept."""
    evidence: Evidence


@dataclass(frozen=True)
class Library:
    """The peers that an ensemble may include beside the winner."""

    peers: tuple[Peer, ...]
    most: int
    """Largest number of networks of the ensemble."""


def confirmed_peers(
    study: Study, confirmation: Confirmation, winner: str, images: Tensor, labels: Tensor
) -> list[Peer]:
    """Return the other contenders of a confirmation that predicted the same images.

    Args:
        winner: Key of the winner.
        images: Rows (M,) of its held-out images: those of all replicates, or of one if a ladder changed its length.
        labels: (N,) int64, of the data set.
    """
    peers = []
    for one in confirmation.contenders:
        if one.key != winner and (evidence := of_confirmation(study, one.identity, labels, images)) is not None:
            config = one.train_config if one.trial is None else study.trained(one.trial).config
            peers.append(Peer(one.name, one.trial, config, one.epochs, evidence))
    return _usable(peers, confirmation.contender(winner).train_config)


def kept_peers(study: Study, winner: int | None, config: TrainConfig, images: Tensor, labels: Tensor) -> list[Peer]:
    """Return the trials, the best first, whose predictions are kept on this machine.

    Args:
        winner: Number of the winner's trial, which is left out.
        config: The winner's.
        images: Rows (M,) of its held-out images.
        labels: (N,) int64, of the data set.
    """
    kept = {int(file.parent.name) for file in study.paths.validation_outputs()} - {winner}
    trials = [
        (study.sign * trial.value, -trial.number)
        for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.number in kept and trial.value is not None
    ]
    peers = []
    for number in (-negative for _, negative in sorted(trials, reverse=True)):
        trained = study.trained(number)
        folder = TrainingPaths(study.paths.trial(number))
        evidence = of_training(folder, trained.config.data.folds or 1, labels)
        if evidence is not None and torch.equal(evidence.images, images):
            peers.append(Peer(f"trial {number}", number, trained.config, trained.epochs, evidence))
    return _usable(peers, config)


def _usable(peers: Iterable[Peer], winner: TrainConfig) -> list[Peer]:
    """Those with finite outputs whose images are made alike, since a model has one size and one kind of channels."""
    drawn = {"split_seed": 0, "val_part": None}
    data = winner.data.model_copy(update=drawn)
    return [
        peer
        for peer in peers
        if peer.config.data.model_copy(update=drawn) == data
        and all(bool(logits.isfinite().all()) for views in peer.evidence.logits.values() for logits in views.values())
    ]
