"""The Snakemake rules; plans, progress and failures of a workflow."""
