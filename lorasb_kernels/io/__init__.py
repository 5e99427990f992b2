"""Adapters on disk: our format, peft's, checkpoints merged shard by shard, the hub."""
