"""Recurrent-depth language models (Geiping et al. 2025).

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

import importlib.metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = importlib.metadata.version("fourfold-recurrent-depth")
