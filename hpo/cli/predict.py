"""`hpo predict`: labels for images."""

from __future__ import annotations

from pathlib import Path

from core.data.layout import printable
from core.runtime import select_device
from hpo.cli.console import say
from hpo.errors import BundleError
from hpo.submission.bundle import load_bundle


def predict_command(
    bundle: Path, images: Path, *, output: Path, probabilities: bool, device_name: str | None, skip_broken: bool
) -> None:
    """Labels images and writes a CSV."""
    if not output.parent.is_dir():  # said before all is labelled, and not after
        raise BundleError(f"{output}: cannot be written (there is no such folder); give another file")
    labelled = load_bundle(bundle, select_device(device_name)).predict(images, skip_broken=skip_broken)
    labelled.write(output, probabilities=probabilities)
    say(f"{len(labelled):,} images labelled: {output}")
    if labelled.broken:
        say(f"  {len(labelled.broken)} broken files left out, the first: {printable(labelled.broken[0])}")
