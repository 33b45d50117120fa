"""The cost of weight normalization, in this library and in its peers, over each one's own plain model."""
