"""The errors that are messages for the user. The command line prints them without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user gave something that cannot run. The message is meant for that person."""


class RunError(RuntimeError):
    """A run had to stop on its way. The message says where it stands and how to go on."""
