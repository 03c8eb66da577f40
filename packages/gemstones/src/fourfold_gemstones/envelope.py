"""Approaches 1 and 2: prescriptions read off the runs themselves, without a form of the law.

The frontier of a table of runs depends on where they end: read `simulate.design_null` beside every slope.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import ConvexHull

from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.laws import Settings
from fourfold_gemstones.runs import Resource, RunTable

Target = Literal["parameters", "tokens", "tokens_per_parameter"]
"""Quantities that an envelope or a parabola prescribes as a power of the resource."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """log(target) = intercept + slope log(resource), in natural logarithms."""

    slope: float
    intercept: float

    def predict(self, resource: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The prescribed target at each budget."""
        return np.exp(self.intercept + self.slope * np.log(resource))

    @classmethod
    def through(cls, x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> Line:
        """Ordinary least squares in logarithms."""
        u, v = np.log(x), np.log(y)
        slope = float(((u - u.mean()) * (v - v.mean())).sum() / np.square(u - u.mean()).sum())
        return cls(slope=slope, intercept=float(v.mean() - slope * u.mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hull:
    """Keep the vertices of the convex hull that face low resource and low loss; the paper's way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Keep the point of least loss in each of `count` logarithmic bins of the resource."""

    count: int = 750


def frontier(
    resource: Float[np.ndarray, " row"], loss_nats: Float[np.ndarray, " row"], method: Hull | Bins
) -> Int[np.ndarray, " vertex"]:
    """Rows on the lower-left envelope, ascending in resource."""
    match method:
        case Hull():
            points = np.log(np.c_[resource, loss_nats])
            # One point above and right of all others closes the hull away from the frontier.
            vantage = np.log([[2 * resource.max(), 2 * loss_nats.max()]])
            vertices = ConvexHull(np.r_[points, vantage]).vertices
            vertices = vertices[vertices < len(points)]
            vertices = vertices[np.argsort(resource[vertices], kind="stable")]
            return vertices[np.diff(loss_nats[vertices], prepend=np.inf) < 0]
        case Bins(count=count):
            edges = np.geomspace(resource.min(), resource.max() * (1 + 1e-12), count + 1)
            number = np.digitize(resource, edges)
            order = np.lexsort((loss_nats, number))
            return order[np.diff(number[order], prepend=-1) > 0]


def overspent(table: RunTable, kind: Resource) -> Float[np.ndarray, " row"]:
    """Log of each row's resource over what the hull of the table needs for the same loss.

    The frontier is interpolated in logarithms; the reference takes its nearest vertex, which gives
    negative overspending.
    """
    resource, loss = table.resource(kind), table.column("loss_nats")
    rows = frontier(resource, loss, Hull())
    return np.log(resource) - np.interp(-np.log(loss), -np.log(loss[rows]), np.log(resource[rows]))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeLaw(Settings):
    """Approach 1: a line through the models on the frontier of loss against a resource.

    It asks for no form of the law, but the frontier is that of these runs, and depends on where they
    end: read `simulate.design_null` beside every slope.
    """

    resource: Resource = "flops"
    target: Target = "parameters"
    method: Hull | Bins = field(default_factory=Hull)
    embeddings: Embeddings = Embeddings.BOTH

    def targets(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """The quantity that is prescribed, at each row."""
        match self.target:
            case "parameters":
                return table.parameters(self.embeddings)
            case "tokens":
                return table.column("tokens")
            case "tokens_per_parameter":
                return table.column("tokens") / table.parameters(self.embeddings)

    def fit(self, table: RunTable) -> EnvelopeFit:
        """The frontier and the line through it.

        Raises:
            ValueError: Fewer than three points, or two models, lie on the frontier.
        """
        resource, targets = table.resource(self.resource), self.targets(table)
        rows = frontier(resource, table.column("loss_nats"), self.method)
        if len(rows) < 3:
            raise ValueError(
                f"the frontier of {table.source} has {len(rows)} points, and a line needs 3; add "
                "checkpoints of more models"
            )
        return EnvelopeFit(
            law=self, table=table, rows=rows, estimate=Line.through(resource[rows], targets[rows])
        )

    def refits(
        self, fit: EnvelopeFit, table: RunTable, weights: Float[np.ndarray, "draw row"]
    ) -> tuple[Line, ...]:
        """The line refitted to the rows of non-zero weight, once per draw."""
        resource, targets = table.resource(self.resource), self.targets(table)
        loss = table.column("loss_nats")
        lines = []
        for weight in weights:
            kept: Bool[np.ndarray, " row"] = weight > 0
            rows = np.flatnonzero(kept)[frontier(resource[kept], loss[kept], fit.law.method)]
            if len(rows) >= 3:
                lines.append(Line.through(resource[rows], targets[rows]))
        return tuple(lines)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnvelopeFit:
    """A fitted envelope."""

    law: EnvelopeLaw
    table: RunTable
    rows: Int[np.ndarray, " vertex"]
    """Rows of the table that lie on the frontier."""
    estimate: Line

    def predict(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """The prescribed target at each row's resource."""
        return self.estimate.predict(table.resource(self.law.resource))

    def score(self, table: RunTable) -> float:
        """R² of the line over the frontier of `table`, in log target."""
        rows = frontier(
            table.resource(self.law.resource), table.column("loss_nats"), self.law.method
        )
        actual = np.log(self.law.targets(table)[rows])
        residual = actual - np.log(self.predict(table)[rows])
        return 1 - float(np.square(residual).sum() / np.square(actual - actual.mean()).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class IsoFlopLaw(Settings):
    """Approach 2: at each of several budgets, the vertex of a parabola of loss in log parameters.

    Runs that pass a budget on their way are read there by interpolating log loss in log resource.
    """

    resource: Resource = "flops"
    target: Literal["parameters", "tokens"] = "parameters"
    budgets: tuple[float, ...] = ()
    """Places of the cuts; empty cuts at ten budgets spread over those that at least five runs pass."""
    embeddings: Embeddings = Embeddings.BOTH

    def fit(self, table: RunTable) -> IsoFlopFit:
        """Cut, fit a parabola at every budget, and a line through the vertices.

        Raises:
            ValueError: Fewer than three budgets give a parabola that opens upwards and whose vertex
                lies among the runs.
        """
        budgets = np.asarray(self.budgets) if self.budgets else self._spread(table)
        vertices = []
        for budget in budgets:
            parameters, tokens, loss = self._cut(table, float(budget))
            if len(np.unique(parameters)) < 4:
                continue
            curve, tilt, _ = np.polyfit(np.log(parameters), np.log(loss), 2)
            vertex = -tilt / (2 * curve) if curve > 0 else np.inf
            inside = np.log(parameters.min()) < vertex < np.log(parameters.max())
            if inside:
                # Tokens at the vertex, along the line that the cut runs in (log N, log T).
                trade = Line.through(parameters, tokens)
                at = np.exp([vertex])
                vertices.append((float(budget), at[0], trade.predict(at)[0], curve))
        if len(vertices) < 3:
            raise ValueError(
                f"{len(vertices)} of {len(budgets)} budgets cut {table.source} in a parabola with its "
                "vertex among the runs, and a line needs 3; add sizes, or choose budgets that more runs pass"
            )
        cuts = np.asarray(vertices)
        prescribed = cuts[:, 1] if self.target == "parameters" else cuts[:, 2]
        return IsoFlopFit(
            law=self,
            table=table,
            budgets=cuts[:, 0],
            prescribed=prescribed,
            curvature=cuts[:, 3],
            estimate=Line.through(cuts[:, 0], prescribed),
        )

    def refits(
        self, fit: IsoFlopFit, table: RunTable, weights: Float[np.ndarray, "draw row"]
    ) -> tuple[Line, ...]:
        """Refitted at the same budgets, each row as often as its weight; failed draws are left out."""
        fixed = dataclasses.replace(self, budgets=tuple(float(budget) for budget in fit.budgets))
        lines = []
        for weight in weights:
            try:
                lines.append(fixed.fit(table.repeated(weight.round().astype(int))).estimate)
            except ValueError:
                continue
        return tuple(lines)

    def _spread(self, table: RunTable) -> Float[np.ndarray, " budget"]:
        resource = table.resource(self.resource)
        _, index = table.groups("run")
        first = np.asarray([resource[index == run].min() for run in range(index.max() + 1)])
        last = np.asarray([resource[index == run].max() for run in range(index.max() + 1)])
        low, high = np.sort(first)[min(4, len(first) - 1)], np.sort(last)[-min(5, len(last))]
        return np.geomspace(low, max(high, low * 1.01), 10)

    def _cut(
        self, table: RunTable, budget: float
    ) -> tuple[Float[np.ndarray, " run"], Float[np.ndarray, " run"], Float[np.ndarray, " run"]]:
        """Parameters, tokens and loss of every run that passes `budget`, at it."""
        resource, parameters = table.resource(self.resource), table.parameters(self.embeddings)
        _, index = table.groups("run")
        points = []
        for run in range(index.max() + 1):
            rows = np.flatnonzero(index == run)
            spent = resource[rows]
            if spent.min() <= budget <= spent.max():
                at = np.log(budget), np.log(spent)
                tokens = np.interp(*at, np.log(table.column("tokens")[rows]))
                loss = np.interp(*at, np.log(table.column("loss_nats")[rows]))
                points.append((parameters[rows[0]], np.exp(tokens), np.exp(loss)))
        columns = np.asarray(points).reshape(-1, 3)
        return columns[:, 0], columns[:, 1], columns[:, 2]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IsoFlopFit:
    """Vertices of parabolas and the line through them."""

    law: IsoFlopLaw
    table: RunTable
    budgets: Float[np.ndarray, " budget"]
    prescribed: Float[np.ndarray, " budget"]
    curvature: Float[np.ndarray, " budget"]
    """Second-order coefficient of log loss in log parameters: how steep the valley is."""
    estimate: Line

    def predict(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """The prescribed target at each row's resource."""
        return self.estimate.predict(table.resource(self.law.resource))

    def score(self, table: RunTable) -> float:
        """R² of the line over the vertices of `table`, in log target."""
        other = self.law.fit(table)
        actual = np.log(other.prescribed)
        residual = actual - np.log(self.estimate.predict(other.budgets))
        return 1 - float(np.square(residual).sum() / np.square(actual - actual.mean()).sum())
