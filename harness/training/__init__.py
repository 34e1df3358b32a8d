"""Training: the loop, optimisers, the weight average, checkpoints, logs and the ledger."""
