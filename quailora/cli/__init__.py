"""The command line, one file per command. It may import everything; nothing imports it."""
