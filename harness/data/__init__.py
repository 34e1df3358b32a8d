"""Data sets: reading them from their sources, splitting them, and loading what was prepared."""
