"""How arrays lie in a compiled function: what the functions that train an arm ask of whoever places its arrays.

`Layout` is the answer on one device, where everything is whole. `placement.Placement` is the one on a mesh.
"""

from __future__ import annotations

from typing import Any

from experiments.tasks import Examples


class Layout:
    """A layout that leaves open where arrays lie. The numbers are the same in any layout, to rounding."""

    def take(self, examples: Examples, rows: Any, /) -> Examples:
        """The examples of a batch."""
        return {name: array[rows] for name, array in examples.items()}

    def share(self, examples: Examples, /) -> Examples:
        """A batch, shared out among the devices."""
        return examples

    def gather(self, params: Any, _uses: Any, /) -> Any:
        """Plain parameters, as layers that use them so need them."""
        return params

    def gather_layer(self, _stack: str, params: Any, _uses: Any, /) -> Any:
        """The same, of one layer of the subtree `stack`, whose leaves have a leading axis of layers."""
        return params
