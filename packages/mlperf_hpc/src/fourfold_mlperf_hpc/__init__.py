"""MLPerf HPC (Farrell et al. 2021): time to quality, taken apart.

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("fourfold-mlperf-hpc")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
