"""The options that every process that trains trials needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Weights = Annotated[
    Path | None,
    AfterValidator(lambda folder: None if folder is None else folder.expanduser().absolute()),
    Field(
        description="Folder of pretrained weights, searched before the hub's cache; by default $HPO_WEIGHTS.",
        json_schema_extra={"metavar": "DIR"},
    ),
]


class TrialOptions(BaseModel):
    """Options of running trials, shared by `hpo run` and `hpo worker`, and passed whole to each worker process."""

    model_config = ConfigDict(frozen=True)

    keep_gb: Annotated[
        float | None,
        Field(
            ge=0,
            description="Disk space for kept weights and checkpoints; the worst trials lose theirs first.",
            json_schema_extra={"metavar": "GB"},
        ),
    ] = None
    weights: Weights = None

    keep: Annotated[
        int,
        Field(
            ge=1,
            description="Number of the best trials whose weights and validation outputs are kept for a refit.",
            json_schema_extra={"metavar": "N"},
        ),
    ] = 3

    tensorboard: Annotated[
        bool,
        Field(description="Write each finished trial's curves, parameters and value for TensorBoard."),
    ] = False

    @property
    def trial_options(self) -> TrialOptions:
        """These options alone, without those of the command."""
        return TrialOptions(**{name: getattr(self, name) for name in TrialOptions.model_fields})
