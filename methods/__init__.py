"""Distillation methods: one file per algorithm, named by its file."""
