"""Curvature along a path of weights, in several parametrizations of the same function at each place.

`coordinates` has the parametrizations, `measure` measures in one of them at one place, and `along` goes through all
places. The table of a config is in `config.conditioning`, and the records are in `run_folder.conditioning`.
"""
