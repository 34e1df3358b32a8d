"""Distil one-step diffusion students under controlled budgets and compare them by one protocol."""

__version__ = "0.1.0"

# Part of everything that decides results: raise it when a change of code changes them, and finished
# runs are made again instead of being compared with new ones.
RESULTS_FORMAT = 2
# The same of scores, and the form of their files: these are made again, and nothing is trained.
SCORES_FORMAT = 4
