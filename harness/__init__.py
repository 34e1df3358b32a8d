"""Distil one-step diffusion students under controlled budgets and compare them by one protocol."""

__version__ = "0.1.0"
