"""The config of an experiment: its tables, reading them from a TOML file, and comparing two."""
