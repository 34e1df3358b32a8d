"""Scores: metrics on features, each number with the protocol that made it."""
