"""Relaying: from an accepted request to its one, exactly accounted end."""
