"""The configuration: its schema, its file with line numbers, its secrets and the rules that cross fields."""
