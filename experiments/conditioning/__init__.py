"""Curvature along a path of weights, in several parametrizations of the same function at each place.

`table` is what a config says of it, `coordinates` the parametrizations, `measure` what is measured in one of them at
one place, `along` goes through all places.
"""
