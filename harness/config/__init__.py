"""Experiment files: their schema, how they are read, and the frozen experiment they become."""
