"""Layouts of image sources, one file each."""
