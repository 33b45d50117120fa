"""Config-driven experiments with wn_jax: `python -m experiments --help`.

`config` reads and checks a TOML file, `data` loads a data set, `models` builds a network, `step` turns a config
into pure training functions, `run` executes them and writes the run folder, `report` draws the table and the
curves. `step_time` measures what a step of each of the `timed_models` costs. `cli` is the command line. They use
wn_jax by its public names only.
"""
