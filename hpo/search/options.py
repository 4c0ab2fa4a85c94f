"""The options that every process that trains trials needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TrialOptions(BaseModel):
    """Options of running trials, shared by `hpo run` and `hpo worker`, and passed whole to each worker process."""

    model_config = ConfigDict(frozen=True)

    keep_gb: Annotated[
        float | None,
        Field(
            ge=0,
            description="Disk space for kept weights and checkpoints; the worst trials lose their weights first.",
            json_schema_extra={"metavar": "GB"},
        ),
    ] = None

    @property
    def trial_options(self) -> TrialOptions:
        """These options alone, without those of the command."""
        return TrialOptions(**{name: getattr(self, name) for name in TrialOptions.model_fields})
