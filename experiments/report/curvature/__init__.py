"""The part of a report on curvature: `conditioning.jsonl` as figures, as a table and as JSON.

`records` reads the file, `figures` has the charts, `table` the table and the JSON.
"""

from experiments.report.curvature.figures import charts
from experiments.report.curvature.records import Curvature, read
from experiments.report.curvature.table import caption, columns, write_summary

__all__ = ["Curvature", "caption", "charts", "columns", "read", "write_summary"]
