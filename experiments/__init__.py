"""Config-driven experiments with wn_jax: `python -m experiments --help`.

The rooms, from what everything may use to what uses everything:

- `errors`, `schema`, `drawing`, `files`, `environment`: what is common to all.
- `parametrizations`, `processes`, `optimizers`: how weights are written, several processes as one run, and optimizers.
- `data`: data sets, and the order in which training sees them.
- `tasks`: networks and their losses.
- `devices`: the mesh, and where arrays lie on it.
- `config`: a TOML file as an experiment, which names one of each of these.
- `run_folder`: what a run writes, and going on from it.
- `engine`: training, all arms side by side; `report`: what came out, as tables, pictures and a page.
- `conditioning`, `tpu`, `vocoder`, `bench`: curvature along training, steps compiled for TPUs, a vocoder, and timings.
- `cli`: the command line.

They use wn_jax by its public names only.
"""
