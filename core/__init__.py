"""Training of one image-classifier configuration, on torch and timm.

`config.py` declares every field. Each other module implements some of them and imports no sibling; `core.loop.train`
combines them.
"""
