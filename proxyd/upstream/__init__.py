"""The room of the upstream side: origins, connections, the pool, who is asked and in which order."""
