"""A box of another kind than Flax's own, for the tests of shardings."""

from flax.core import meta


class Foreign(meta.AxisMetadata):
    """A box of somebody else, which carries no names: Flax asks for these four methods only."""

    def __init__(self, value):
        self.value = value

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return Foreign(value)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self
