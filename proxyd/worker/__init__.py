"""A worker: one uvloop that accepts on its slot's listeners and serves."""
