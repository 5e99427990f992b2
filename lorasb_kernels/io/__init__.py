"""Adapters on disk: this library's format, peft's format, merging on disk, the hub."""
