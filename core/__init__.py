"""Training of one image-classifier configuration, on torch and timm."""
