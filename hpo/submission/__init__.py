"""Turns a configuration into a submission model: one network trained on everything, or several.

Validation decides, and the rest follows. Networks trained without the validation images (`networks`) choose on those
images the views, the form and the temperature (`decision`). Then the same is trained again on training and validation
images together, and only then the test set is opened and the model written (`refit`).
"""

from hpo.submission.decision import Decision, Temperature
from hpo.submission.refit import Refitted, refit, search_summary

__all__ = ["Decision", "Refitted", "Temperature", "refit", "search_summary"]
