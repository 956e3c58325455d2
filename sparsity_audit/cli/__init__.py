"""The command line: a command parses, calls one api function and prints. Click lives here only."""
