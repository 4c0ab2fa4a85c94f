"""The space of a confirmation: no search, but given configurations, each trained several times.

A trial's configuration is a user attribute, so that workers can train candidates chosen after they joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpo.space.grammar import Confirm, NoPruner, Pruner, RandomSampler, Sampler
from hpo.space.space import Parameter, Recipe, SearchSpace

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

CANDIDATE = "candidate"
"""Parameter: the candidate's index. User attribute: its name."""
REPLICATE = "replicate"
"""Parameter: the index of the trial's seed and split."""

RANDOM = RandomSampler(name="random")
UNPRUNED = NoPruner(name="none")  # only complete trainings are compared
MOST = 9999  # Optuna needs a bound; a confirmation has at most 8 candidates and 20 replicates at a time


@dataclass(frozen=True, kw_only=True)
class ConfirmationSpace(SearchSpace):
    """Its baseline is that of the confirmed search."""

    confirms: str
    """Name of the study whose configurations are trained again."""
    train_images: int
    """Training images of one split or fold."""
    val_images: int
    """Validation images of one split or fold."""

    description: str = ""
    trials: int = 1
    sampler: Sampler = RANDOM
    pruner: Pruner = UNPRUNED
    confirm: Confirm = field(default_factory=Confirm)
    recipes: tuple[Recipe, ...] = ()
    search: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def trains_baseline(self) -> bool:
        return False

    @property
    def test_share(self) -> float:
        """Correlation term of overlapping splits."""
        return self.val_images / self.train_images

    @property
    def resolution(self) -> float:
        """Smallest change of a score: one validation image; 0 for the loss."""
        return 0.0 if self.metric == "nll" else 1 / self.val_images

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        return {name: trial.suggest_int(name, 0, MOST) for name in (CANDIDATE, REPLICATE)}

    def shown(self, trial: BaseTrial) -> dict[str, Any]:
        return {**trial.params, CANDIDATE: trial.user_attrs[CANDIDATE]}

    def identity(self) -> dict[str, Any]:
        return {"confirms": self.confirms, **super().identity()}
