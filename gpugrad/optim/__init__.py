"""Gradient descent and its relatives, and `minimize`, which drives them over an objective."""

from gpugrad.optim.first_order import SGD, Adam, AdamW, GradientDescent, Optimizer
from gpugrad.optim.minimize import Result, minimize

__all__ = ["SGD", "Adam", "AdamW", "GradientDescent", "Optimizer", "Result", "minimize"]
