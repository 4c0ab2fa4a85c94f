"""Optimizers, with the schedule's factor and weight decay that means the same under each."""

from core.optim.steps import StepOptimizer, build_optimizer, needs_head

__all__ = ["StepOptimizer", "build_optimizer", "needs_head"]
