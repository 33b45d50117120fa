"""Config-driven experiments with wn_jax: `python -m experiments --help`.

A TOML file (`toml_file`, `config`) names a data set (`data`), a network and its loss (`tasks`), how its weights are
written (`parametrizations`) and an optimizer (`optimizers`). `training` makes pure functions of one seed of that, `arm`
compiles them for all seeds and learning rates on the devices (`mesh`, `placement`, `sharding`), `run` executes the arms
side by side in a run folder (`run_folder`, `checkpoints`), in one process or several (`processes`), and `report` shows
what came out. `bench` and `overhead` measure.
They use wn_jax by its public names only.
"""
