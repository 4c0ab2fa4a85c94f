"""What a confirmation trains: no search, but whole configurations, each again and again.

Every trial brings its configuration with it, seed and split included, as a user attribute. So a worker that joined
earlier can train a candidate that was chosen later, and what stands in the storage is exactly what was trained. Its two
Optuna parameters only say which trial is which: `candidate`, the place in the list of all candidates so far, 0 first,
and `replicate`. A candidate's name stands in an attribute, since Optuna fixes the choices of a categorical parameter
with a study's first trial, and the candidates of a study that goes on change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config import TrainConfig
from hpo.space.grammar import Confirm, NoPruner, Objective, RandomSampler
from hpo.space.space import SearchSpace

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

CANDIDATE = "candidate"
"""The parameter and the user attribute of a confirmation's trial: the place of what it trains, and its name."""
REPLICATE = "replicate"
"""The parameter of a confirmation's trial: which of the seeds and splits it trains with, from 0 on."""

MOST = 9999  # bounds that a parameter has to have; a confirmation has 8 candidates and 20 replicates at once


@dataclass(frozen=True)
class ConfirmationSpace(SearchSpace):
    """The place of a search space in the confirmation of a study; its `base` is the search's."""

    confirms: str
    """The study whose configurations are trained again."""
    train_images: int
    """Of one split, or of one fold."""
    val_images: int

    @classmethod
    def of(
        cls,
        confirms: str,
        objective: Objective,
        baseline: TrainConfig,
        path: Path,
        *,
        train_images: int,
        val_images: int,
    ) -> ConfirmationSpace:
        """That of a study whose space has this objective and base."""
        return cls(
            name=path.stem,
            path=path,
            description="",
            objective=objective,
            trials=1,
            sampler=RandomSampler(name="random"),
            pruner=NoPruner(name="none"),  # a score of half a training says nothing of the whole one
            baseline=baseline,
            recipes=(),
            search={},
            confirm=Confirm(),
            confirms=confirms,
            train_images=train_images,
            val_images=val_images,
        )

    @property
    def trains_baseline(self) -> bool:
        """False: a confirmation queues the trials that it needs."""
        return False

    @property
    def test_share(self) -> float:
        """Validation images / training images of one split, by which overlapping splits depend on each other."""
        return self.val_images / self.train_images

    @property
    def resolution(self) -> float:
        """The step in which a score can change: one validation image; 0 for the loss, which has none."""
        return 0.0 if self.metric == "nll" else 1 / self.val_images

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The two parameters, which were fixed when the trial was queued."""
        return {name: trial.suggest_int(name, 0, MOST) for name in (CANDIDATE, REPLICATE)}

    def shown(self, trial: BaseTrial) -> dict[str, Any]:
        """The candidate by its name."""
        return {**trial.params, CANDIDATE: trial.user_attrs[CANDIDATE]}

    def identity(self) -> dict[str, Any]:
        """That of the search, as far as what it searches does not matter, and which study it is."""
        return {"confirms": self.confirms, **super().identity()}

    def described(self) -> dict[str, Any]:
        """All but the base, as plain data."""
        return {
            "confirms": self.confirms,
            "train_images": self.train_images,
            "val_images": self.val_images,
            "objective": self.objective.model_dump(mode="json"),
        }
