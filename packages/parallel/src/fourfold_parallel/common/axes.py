"""The names of the grid's four axes, for what computes on them and what plans them."""

from typing import Literal

AxisName = Literal["data", "depth", "row", "col"]
AXES: tuple[AxisName, ...] = ("data", "depth", "row", "col")
