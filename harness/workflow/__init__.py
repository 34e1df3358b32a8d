"""The Snakemake rules, and what plans, watches and explains a workflow."""
