"""Shared memory of one node's processes: metrics, liveness beats, revocations."""
