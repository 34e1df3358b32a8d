"""The training loop and what it keeps: optimisers, EMA, checkpoints, logs and the ledger."""
