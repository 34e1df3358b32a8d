"""The papers' published numbers, and how far a run's settings match theirs."""
