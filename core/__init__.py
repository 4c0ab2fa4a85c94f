"""Training of one image-classifier configuration, on torch and timm.

`config.py` declares every field of a configuration. Each other module implements some of them and imports no sibling:
`data` and `feed` (images), `sampling` and `augment` (batches), `models`, `losses`, `optim` (optimizers), `schedule`,
`averaging`, `metrics`, `tta`, `checkpoint`. `loop` combines them in `core.loop.train`.
"""
