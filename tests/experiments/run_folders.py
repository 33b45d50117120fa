"""Run folders that are made up, for tests of what is made of them."""

import io
import json

from rich.console import Console

from experiments.cli import tables

CONFIG = 'name = "made-up"\n[train]\nsteps = 20\nseeds = 2\nfirst_seed = 5\ntarget_loss = 0.1\n'
ENVIRONMENT = {
    "command": "python -m experiments compare it.toml", "commit": "c0ffee", "python": "3.11.1", "cpus": 2,
    "packages": {"jax": "0.10.0"}, "platform": "Linux", "devices": ["cpu: cpu"], "started": "2026-01-02T03:04:05+0000",
}  # fmt: skip


def record(arm, step, loss, error=None, rate=0.1, metric="test_error", **rest):
    figures = {} if error is None else {metric: error}
    return {"arm": arm, "learning_rate": rate, "step": step, "train_loss": loss, **figures, **rest}


RECORDS = [
    record("a", 10, [0.5, 0.1], [0.2, 0.4]),
    record("b", 10, [0.4, 0.1], [0.9, 0.4]),
    record("a", 20, [0.1, 0.05], [0.1, 0.3]),
    record("b", 20, [None, 0.1], [0.9, 0.2]),
]
TIMES = [("a", 10, 1.0), ("b", 10, 1.5), ("a", 20, 2.0), ("b", 20, 2.0)]


def write_run(tmp_path, records=RECORDS, times=(), name="run", config=CONFIG, environment=ENVIRONMENT):
    """A run folder."""
    path = tmp_path / name
    path.mkdir(parents=True)
    (path / "config.toml").write_text(config)
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if times:
        lines = (dict(zip(("arm", "step", "seconds_per_step"), time, strict=True)) for time in times)
        (path / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def printed(table, width=100):
    """The text that a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO())
    console.print(tables.of_report(table))
    return console.file.getvalue()
