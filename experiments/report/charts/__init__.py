"""The numbers that each figure shows. How it is drawn is for `curves` and `svg`.

`shapes` says what a chart is, `over_time` has the charts against steps, `sweep` those against learning rates.
"""

from experiments.report.charts.over_time import layers, over_time
from experiments.report.charts.shapes import Chart, Line, Panel
from experiments.report.charts.sweep import sweep

__all__ = ["Chart", "Line", "Panel", "layers", "over_time", "sweep"]
