"""`hpo predict`: label images with a submission model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hpo.api.options import PredictOptions
from hpo.errors import BundleError
from hpo.submission.locate import locate_bundle

if TYPE_CHECKING:
    from hpo.submission.predictions import Predictions

logger = logging.getLogger(__name__)


def predict(options: PredictOptions) -> Predictions:
    """Label images, and write the labels to `options.output` as CSV, in the form of a sample if there is one.

    Raises:
        HpoError: The bundle cannot be loaded, the images cannot be labelled or do not fit the sample, or the file
            cannot be written.
        CoreError: An image is missing or broken, or there is no such device.
    """
    output = options.output
    if options.like is not None and options.probabilities:
        raise BundleError("--like writes the columns of the sample, --probabilities adds others; give one of them")
    if not output.parent.is_dir():  # found before the images are labelled, not after
        raise BundleError(f"{output}: cannot be written (there is no such folder); give another file")
    folder = locate_bundle(options.bundle)
    if str(folder) != options.bundle:
        logger.info("model: %s", folder)
    from core.data import image_ids  # with torch, which a wrong name does not wait for
    from core.runtime import select_device
    from hpo.submission.bundle import load_bundle
    from hpo.submission.samples import Sample

    sample = None if options.like is None else Sample.read(options.like, output=output)
    model = load_bundle(folder, select_device(options.device))
    if sample is not None:  # misfits too are found before the images are labelled
        sample.form(image_ids(options.images, skip_broken=options.skip_broken), model.meta.classes)
    predictions = model.predict(options.images, skip_broken=options.skip_broken)
    predictions.write(output, probabilities=options.probabilities, like=sample)
    return predictions
