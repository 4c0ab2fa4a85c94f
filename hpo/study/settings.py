"""Settings of a study, stored as its attributes."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hpo.storage.optuna_access import attribute_of, set_attribute

if TYPE_CHECKING:
    import optuna

    from hpo.space import SearchSpace

T = TypeVar("T")


class _Setting(Generic[T]):
    def __init__(self, key: str, default: T) -> None:
        self._key, self._default = key, default

    def __get__(self, settings: StudySettings | None, _: type[StudySettings]) -> T:
        if settings is None:  # read from the class
            return self  # type: ignore[return-value]
        value: T = settings.get(self._key, self._default)
        return value

    def __set__(self, settings: StudySettings, value: T) -> None:
        if value != settings.get(self._key, self._default):
            settings.set(self._key, value)


class StudySettings:
    """Assigning a setting stores it if it differs."""

    total = _Setting[int | None]("trials", None)
    """Number of trials that the study was last run for; None before."""
    command = _Setting[str | None]("command", None)
    """Command that last ran the study, without any password; None before."""
    retries = _Setting("retries", 3)  # one more than a pool restarts a worker
    """How often a trial is retried after its process died."""
    space = _Setting[str | None]("space", None)
    """The search space as YAML."""
    deadline = _Setting[dict[str, float] | None]("deadline", None)
    """Time limit and used time in seconds; see `hpo.study.deadline`."""
    patience = _Setting("patience", False)
    """Whether the search ends when a better trial is unlikely; see `hpo.study.patience`."""
    weights = _Setting[str | None]("weights", None)
    """Folder of pretrained weights that the study was last run with (`--weights`); None without one."""
    length_probe = _Setting[dict[str, Any] | None]("length_probe", None)
    """Result of the length probe, see `hpo.search.length`; None before."""
    verdict = _Setting[str | None]("confirmation", None)
    """Result of the confirmation in words; None before."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute; do not change it."""
        return attribute_of(self._study, key, default)

    def set(self, key: str, value: Any) -> None:
        """Store an attribute if it differs."""
        if self.get(key) != value:
            set_attribute(self._study, key, value)

    def set_space(self, space: SearchSpace) -> None:
        from hpo.space import space_to_yaml

        self.space = space_to_yaml(space)

    def packing(self, device: str) -> tuple[int, str] | None:
        """Return the best number of simultaneous trials, and the reason; None if unknown."""
        known = self.get("packing", {}).get(_on_this_host(device))
        return None if known is None else (int(known["trials"]), str(known["why"]))

    def set_packing(self, device: str, trials: int, why: str) -> None:
        self.set("packing", {**self.get("packing", {}), _on_this_host(device): {"trials": trials, "why": why}})

    def trains_without_graphs(self, network: str) -> bool:
        """Return whether a CUDA graph of a step of this `model.name` made a process unusable."""
        return bool(self.get(_graphs_of(network), False))

    def train_without_graphs(self, network: str) -> None:
        self.set(_graphs_of(network), True)

    def add_device(self, device: str) -> None:
        """Add a device of this host for the dashboard."""
        key = f"devices:{socket.gethostname()}"
        known = str(self.get(key, ""))
        if device not in known.split("; "):
            self.set(key, f"{known}; {device}" if known else device)


def _graphs_of(network: str) -> str:
    return f"without CUDA graphs: {network}"


def _on_this_host(device: str) -> str:
    """Hosts may have devices of the same name, but other processors and memory."""
    return f"{socket.gethostname()}: {device}"
