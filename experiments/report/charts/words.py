"""The words for metrics that labels and captions share."""

from __future__ import annotations

from experiments.report import summary


def quantity(metric: str) -> str:
    """The name of a metric."""
    return metric.replace("_", " ")


def with_unit(metric: str) -> str:
    """The name of a metric, with its unit where it has one."""
    return quantity(metric) + " (%)" * (summary.scale(metric) == 100)
