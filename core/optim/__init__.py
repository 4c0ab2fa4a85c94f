"""Optimizers, with the schedule's factor and weight decay that means the same under each."""

from core.optim.own_optimizer import try_own
from core.optim.steps import StepOptimizer, build_optimizer, needs_head

__all__ = ["StepOptimizer", "build_optimizer", "needs_head", "try_own"]
