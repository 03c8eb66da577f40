"""HPC-Coder-V2: a scorer of generated parallel programs, and the study of what makes a code model write them.

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("fourfold-hpc-coder")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
