"""The master: owns listeners, shared memory and children; no event loop, no thread, no sleep."""
