"""The keys in which two experiments differ, of those that their numbers depend on."""

from __future__ import annotations

from typing import Any

from experiments.config.experiment import Experiment

# Keys that change no number: data is checked by its content, wherever it lies.
_MAY_DIFFER = (
    *(".data.dir", ".data.path", ".train.on_nonfinite", ".train.keep_checkpoints"),
    *(".mesh.data", ".mesh.fsdp", ".mesh.model"),
)


def between(there: Experiment, here: Experiment) -> list[str]:
    """A line for each key that is not the same in both, with both values."""
    one, other = _comparable(there), _comparable(here)
    return [
        f"{key}: {one.get(key, 'nothing')} there, {other.get(key, 'nothing')} here"
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _comparable(experiment: Experiment) -> dict[str, Any]:
    """Every key of an experiment that its numbers depend on, by its dotted name."""
    flat: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        elif not name.endswith(_MAY_DIFFER):
            flat[name] = value

    walk(experiment.model_dump(mode="json"), "")
    return flat
