"""Trains the best configurations again on other seeds and splits, and says whether one of them beats the base."""
