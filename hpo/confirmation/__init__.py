"""Train the best configurations again with other seeds and splits, and test whether one of them beats the baseline."""
