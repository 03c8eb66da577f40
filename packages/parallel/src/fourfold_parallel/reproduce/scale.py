"""The sizes of a reproduction."""

from typing import Literal

Scale = Literal["smoke", "laptop", "paper"]
"""Minutes on 2 cores (CI), an evening's laptop, or the paper's own size, which is launched by hand."""
