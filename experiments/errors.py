"""The errors that are messages for the user; the command line prints them without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """What the user gave cannot run; the message is meant for that person."""


class RunError(RuntimeError):
    """A run had to stop on its way; the message says where it stands and how to go on."""
