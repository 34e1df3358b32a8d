"""Tests; `make test` runs the fast ones."""
