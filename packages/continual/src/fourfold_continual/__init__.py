"""Aurora-M's curriculum (Nakamura et al. 2024): continual pretraining, replay, and measured forgetting.

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("fourfold-continual")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
