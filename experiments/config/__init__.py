"""What an experiment is, and reading one from a TOML file."""
