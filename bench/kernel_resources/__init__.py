"""Registers, shared memory and spills of every kernel and tile, as compiled ahead of time."""
