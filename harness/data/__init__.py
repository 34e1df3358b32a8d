"""Data sets: a registry, one file for each of them, and the store of prepared images."""
