"""Scripts for developers: stress tests, a local Slurm, and checks of the source."""
