"""The command line: a file for each command, and what they share.

Nothing else parses options or exits, but for `__main__`, where a requirement is missing. Nothing else prints, but for
`data.fetch`, where its caller names nobody to tell.
"""
