"""`hpo predict`: label images with a submission model."""

from __future__ import annotations

from core.runtime import select_device
from hpo.api.options import PredictOptions
from hpo.errors import BundleError
from hpo.submission.bundle import load_bundle
from hpo.submission.predictions import Predictions


def predict(options: PredictOptions) -> Predictions:
    """Label images, and write the labels to `options.output` as CSV.

    Raises:
        HpoError: The bundle cannot be loaded, the images cannot be labelled, or the file cannot be written.
        CoreError: An image is missing or broken, or there is no such device.
    """
    output = options.output
    if not output.parent.is_dir():  # found before the images are labelled, not after
        raise BundleError(f"{output}: cannot be written (there is no such folder); give another file")
    model = load_bundle(options.bundle, select_device(options.device))
    predictions = model.predict(options.images, skip_broken=options.skip_broken)
    predictions.write(output, probabilities=options.probabilities)
    return predictions
