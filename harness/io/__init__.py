"""Files: atomic writes, typed records, tensor shards, downloads, locks and logging."""
