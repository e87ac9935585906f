"""The command line: argv to action."""
