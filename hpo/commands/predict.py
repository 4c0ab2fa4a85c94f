"""`hpo predict`: labels for images."""

from __future__ import annotations

from pathlib import Path

from core.data.layout import printable
from core.runtime import select_device
from hpo.console import say
from hpo.predict import predict


def predict_command(
    bundle: Path, images: Path, *, output: Path, probabilities: bool, device_name: str | None, skip_broken: bool
) -> None:
    """Labels images and writes a CSV."""
    labelled = predict(bundle, images, device=select_device(device_name), skip_broken=skip_broken)
    labelled.write(output, probabilities=probabilities)
    say(f"{len(labelled.ids):,} images labelled: {output}")
    if labelled.broken:
        say(f"  {len(labelled.broken)} broken files left out, the first: {printable(labelled.broken[0])}")
