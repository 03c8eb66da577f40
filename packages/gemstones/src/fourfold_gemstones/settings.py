"""What the estimators share: their settings, as tools that copy and search estimators ask for them."""

from __future__ import annotations

import dataclasses
from typing import Any


class Settings:
    """Of a frozen dataclass whose fields are its settings."""

    __slots__ = ()

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002 - scikit-learn's
        """The settings by name; scikit-learn's `clone` rebuilds an estimator from them."""
        mine: Any = self
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(mine)}
