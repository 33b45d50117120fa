"""The code of the documentation, for the tests that run it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(name):
    """The Python blocks of a Markdown file."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(name):
    """The names that the blocks of a Markdown file define, run one after the other."""
    names: dict[str, object] = {}
    for block in blocks(name):
        exec(block, names)
    return names
