"""The command line: a file for each command, and what they share. Nothing else prints, parses options or exits."""
