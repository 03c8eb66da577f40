"""Charts that the page of a report and the figures of the study share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from fourfold_parallel.reproduce.claims import Interval
from fourfold_parallel.reproduce.figures import BASELINE, IDEAL, METHOD, SHADES

HEAT = LinearSegmentedColormap.from_list("heat", ["#f5f6f8", "#f4c9a8", METHOD])


def heat(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """Coordinates by layers: the share of tokens in which each is far from the others."""
    image = axes.imshow(
        np.asarray([*shares.values()]),
        aspect="auto",
        cmap=HEAT,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_yticks(range(len(shares)), list(shares))
    axes.grid(visible=False)
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("coordinate")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("share of tokens")
    bar.outline.set_visible(False)


def stack(
    axes: Axes,
    parts: Mapping[str, Sequence[float]],
    whole: Sequence[float],
    without: Sequence[float],
) -> None:
    """Contributions to the mean cosine, one upon the other; the whole, and what is left without them."""
    layers = np.arange(len(whole))
    below = np.zeros(len(whole))
    for place, (name, values) in enumerate(parts.items()):
        above = below + np.maximum(values, 0)
        color = SHADES[place % len(SHADES)]
        axes.fill_between(layers, below, above, color=color, alpha=0.75, linewidth=0, label=name)
        below = above
    axes.plot(layers, whole, color=IDEAL, label="all coordinates")
    axes.plot(layers, without, color=BASELINE, linestyle="--", label="without these")
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("mean cosine of two tokens")
    axes.set_ylim(0, 1.3 * max(whole))
    axes.legend(ncols=5, fontsize=8, loc="upper left")


def bars(axes: Axes, rows: Sequence[tuple[str, Interval, str]]) -> None:
    """Loss rises with their intervals: a name, the rise and a colour each."""
    for place, (_, rise, color) in enumerate(rows):
        axes.barh(place, rise.value, color=color, height=0.62)
        axes.plot([rise.low, rise.high], [place, place], color=IDEAL, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("rise of the loss (nats a token, 95 %)")
