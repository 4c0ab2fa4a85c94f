"""Trains one configuration of an image classifier: torch and timm, and nothing of Optuna, YAML or the terminal."""
