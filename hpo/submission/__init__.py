"""Turn a configuration into a submission model: one network trained on all images, or several.

`refit.py` describes the steps. `bundle.py` writes and loads the model's folder, `card.py` its README; an export format
is a module beside `onnx_export.py`, called by `refit.py`.
"""

from hpo.submission.candidates import Temperature
from hpo.submission.decision import Decision, Forced
from hpo.submission.refit import Refitted, Training, refit, search_summary

__all__ = ["Decision", "Forced", "Refitted", "Temperature", "Training", "refit", "search_summary"]
