"""How running work is reported: the interface that the terminal implements, and that workers call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.loop import EpochMetrics
    from hpo.trials import Outcome


class Listener(Protocol):
    """Whoever wants to see a study run, one training at a time."""

    def trial_started(self, label: str, config: TrainConfig) -> None: ...

    def epoch_ended(self, epoch: EpochMetrics, verdict: str) -> None: ...

    def trial_ended(self, outcome: Outcome) -> None: ...

    def reference_ended(self, name: str, result: dict[str, Any]) -> None: ...
