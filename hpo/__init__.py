"""Searches training configurations with Optuna, and refits the best into a model."""
