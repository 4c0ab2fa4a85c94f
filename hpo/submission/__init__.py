"""Turn a configuration into a submission model: one network trained on all images, or several.

`refit.py` describes the steps. `bundle.py` writes and loads the model's folder, `card.py` its README; an export format
is a module beside `onnx_export.py`, called by `refit.py`.
"""
