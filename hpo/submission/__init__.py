"""Turn a configuration into a submission model: one network trained on all images, or several.

Networks trained without the validation images decide on those images: the views, the form and the temperature. Then the
networks of the model are trained on training and validation images together (`refit`), unless they are an ensemble of
folds. The test set is opened last. `bundle.py` writes and loads the model's folder, `card.py` its README; an export
format is a module beside `onnx_export.py`, called by `refit.py`.
"""

from hpo.submission.decision import Decision, Temperature
from hpo.submission.refit import Refitted, refit, search_summary

__all__ = ["Decision", "Refitted", "Temperature", "refit", "search_summary"]
