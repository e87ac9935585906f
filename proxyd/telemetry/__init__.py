"""Telemetry: every transaction becomes exactly one row, whatever dies on the way."""
