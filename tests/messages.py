"""Messages of errors, for the tests that read them."""

import re


def pattern(words):
    """A pattern for a message that has these words, in which `.*` stands for anything between."""
    return ".*".join(re.escape(part) for part in words.split(".*"))
