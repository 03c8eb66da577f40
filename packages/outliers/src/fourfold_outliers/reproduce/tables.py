"""Tables of this package, rendered from the committed records."""

from collections.abc import Callable

from fourfold_parallel.reproduce.claims import Records

TABLES: dict[str, Callable[[Records], str]] = {}
