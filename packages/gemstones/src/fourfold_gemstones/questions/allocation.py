"""Width, depth, parameters and tokens that a law prescribes for a budget of compute or time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.architecture import Architecture, Embeddings
from fourfold_gemstones.laws import PowerLaw, Variable
from fourfold_gemstones.minimise import CONFIRMATIONS
from fourfold_gemstones.parametric import LawWarning, ParametricFit
from fourfold_gemstones.runs import RunTable, UnknownArchitecture
from fourfold_gemstones.uncertainty import Bootstrap, Interval, percentile_interval

Throughput = Callable[
    [Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]], Float[np.ndarray, "*shape"]
]
"""Training tokens per device-second of a shape: measured, or from a performance model."""
WIDTHS = (16.0, 2.0**20)
DEPTHS = (1.0, 4096.0)
"""Search window of a free shape; an optimum on its edge is reported as such."""
GRID = 49
"""Nodes per dimension of the search grid, which is refined `ZOOMS` times around its best node."""
ZOOMS = 11
WIDEST_ASPECT = 10.0
"""Ratio of the ends of an interval of width over depth above which no shape is read off it."""
MOST_AT_EDGE = 0.05
"""Share of draws at the edge of the search window above which no shape is read."""
FAR = 10.0
"""Budgets beyond this multiple of the largest run's are extrapolation, and warned about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A budget in training FLOPs, counted term by term."""

    def tokens(
        self,
        architecture: Architecture,
        width: Float[np.ndarray, "*shape"],
        depth: Float[np.ndarray, "*shape"],
        budget: float,
    ) -> Float[np.ndarray, "*shape"]:
        """Tokens that the budget buys at each shape."""
        return budget / architecture.flops_per_token(width, depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class SixNT:
    """A budget in FLOPs by the rule of thumb 6 N T, N with both embedding tables."""

    def tokens(
        self,
        architecture: Architecture,
        width: Float[np.ndarray, "*shape"],
        depth: Float[np.ndarray, "*shape"],
        budget: float,
    ) -> Float[np.ndarray, "*shape"]:
        """Tokens that the budget buys at each shape."""
        return budget / (6 * architecture.parameters(width, depth))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHours:
    """A budget in device-hours at a throughput per shape."""

    throughput: Throughput

    def tokens(
        self,
        architecture: Architecture,
        width: Float[np.ndarray, "*shape"],
        depth: Float[np.ndarray, "*shape"],
        budget: float,
    ) -> Float[np.ndarray, "*shape"]:
        """Tokens that the budget buys at each shape."""
        del architecture
        return budget * 3600 * self.throughput(width, depth)


Cost = Compute | SixNT | DeviceHours


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """Any real width and depth: the bound on what shapes that exist can reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aspect:
    """Width over depth is fixed: for laws that cannot tell shapes apart."""

    ratio: float = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Shapes that can be built: whole blocks, whole heads, heads that divide over devices."""

    head_width: int = 128
    heads_multiple: int = 2
    """Heads are a multiple of this: 2 for paired key and value heads, times tensor parallelism."""

    def __post_init__(self) -> None:
        if self.head_width < 1 or self.heads_multiple < 1:
            raise ValueError(
                f"head_width={self.head_width} and heads_multiple={self.heads_multiple} must be at "
                "least 1; the paper's are 128 and 2"
            )


Shapes = Free | Aspect | Lattice


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A shape, its tokens, and the loss the law expects of them."""

    budget: float
    width: float
    depth: float
    parameters: float
    """Both embedding tables counted."""
    tokens: float
    loss_nats: float
    at_edge: bool
    """The search window, not the law, decided: then there is no optimum to report."""

    @property
    def aspect(self) -> float:
        """Width over depth."""
        return self.width / self.depth

    @property
    def tokens_per_parameter(self) -> float:
        """The ratio that Hoffmann et al. put at twenty."""
        return self.tokens / self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """A law with what it needs to spend a budget: architecture, convention, cost, shapes."""

    architecture: Architecture
    cost: Cost
    shapes: Shapes
    embeddings: Embeddings = Embeddings.BOTH

    def loss(
        self,
        law: PowerLaw,
        width: Float[np.ndarray, "*shape"],
        depth: Float[np.ndarray, "*shape"],
        tokens: Float[np.ndarray, "*shape"],
    ) -> Float[np.ndarray, "*shape"]:
        """Loss that the law expects of shapes and token counts, in nats per token."""
        inputs: dict[Variable, Float[np.ndarray, "*shape"]] = {}
        for variable in law.variables:
            match variable:
                case "parameters":
                    inputs[variable] = self.architecture.parameters(width, depth, self.embeddings)
                case "effective_parameters":
                    inputs[variable] = self.architecture.flops_per_token(width, depth) / 6
                case "width":
                    inputs[variable] = width
                case "depth":
                    inputs[variable] = depth
                case "tokens":
                    inputs[variable] = tokens
                case other:
                    raise ValueError(
                        f"a law in {other} cannot be planned by width, depth and tokens alone; plan by one "
                        "in parameters, width and depth"
                    )
        return law.loss(inputs)

    def allocate(self, law: PowerLaw, budget: float) -> Allocation:
        """The shape and tokens of least expected loss that the budget buys.

        Raises:
            ValueError: The budget is not positive, or the law is blind to shape and `shapes` is
                not an `Aspect`.
        """
        if not (budget > 0 and math.isfinite(budget)):
            raise ValueError(f"budget={budget} must be positive and finite; for example 1e21 FLOPs")
        match self.shapes:
            case Aspect(ratio=ratio):
                return self._zoom(law, budget, lambda w, _: (w, np.maximum(w / ratio, 1e-3)), 1)
            case Free():
                self._refuse_blind(law)
                return self._zoom(law, budget, lambda w, d: (w, d), 2)
            case Lattice():
                return self.near(law, budget, within_nats=0.0)[0]

    def _refuse_blind(self, law: PowerLaw) -> None:
        if not {"width", "depth"} <= set(law.variables):
            raise ValueError(
                f"a law in {law.variables} cannot tell shapes of one size apart, and would choose the "
                "cheapest; fit a law in width and depth, or plan with shapes=Aspect(ratio=...)"
            )

    def _zoom(
        self,
        law: PowerLaw,
        budget: float,
        shape: Callable[
            [Float[np.ndarray, " node"], Float[np.ndarray, " node"]],
            tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]],
        ],
        dimensions: int,
    ) -> Allocation:
        """The least loss over shapes, by a grid that is refined around its best node.

        The loss need not be convex in shape, so that a grid looks everywhere first. `GRID` nodes an
        axis, even in logarithms, span the window; the next window is centred on the best node and .3
        times as wide, some 14 spacings of the last grid: wide enough for an optimum that lies between
        nodes, in a valley that runs aslant. After `ZOOMS` windows the spacing is a millionth of the
        first one's.

        Args:
            law: whose loss is least.
            budget: that each shape spends whole, on tokens.
            shape: width and depth of the nodes, which are widths and depths, or widths alone.
            dimensions: of the grid: one under an `Aspect`, else two.
        """
        # Centre of a window, its limits, and everything else on this grid are logarithms.
        window = [np.log(WIDTHS), np.log(DEPTHS)]
        limits = [pair.copy() for pair in window]
        width = depth = np.ones(1)
        nodes = [np.zeros(1)] * dimensions
        best = 0
        for _ in range(ZOOMS):
            # All pairs of nodes in one list: `nodes[0]` the widths, `nodes[-1]` the depths, or widths again.
            axes = [np.linspace(low, high, GRID) for low, high in window[:dimensions]]
            nodes = [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
            width, depth = shape(np.exp(nodes[0]), np.exp(nodes[-1]))
            tokens = self.cost.tokens(self.architecture, width, depth, budget)
            best = int(np.argmin(self.loss(law, width, depth, tokens)))
            # The search window itself is never left.
            for dim in range(dimensions):
                reach = 0.15 * (window[dim][1] - window[dim][0])
                low, high = nodes[dim][best] - reach, nodes[dim][best] + reach
                window[dim] = np.clip([low, high], *limits[dim])
        # An optimum on a limit is the window's and not the law's.
        edges = [
            abs(nodes[dim][best] - limit) < 1e-3
            for dim in range(dimensions)
            for limit in limits[dim]
        ]
        return self._at(law, budget, float(width[best]), float(depth[best]), at_edge=any(edges))

    def _at(
        self, law: PowerLaw, budget: float, width: float, depth: float, *, at_edge: bool
    ) -> Allocation:
        w, d = np.asarray([width]), np.asarray([depth])
        tokens = self.cost.tokens(self.architecture, w, d, budget)
        return Allocation(
            budget=budget,
            width=width,
            depth=depth,
            parameters=float(self.architecture.parameters(w, d)[0]),
            tokens=float(tokens[0]),
            loss_nats=float(self.loss(law, w, d, tokens)[0]),
            at_edge=at_edge,
        )

    def near(self, law: PowerLaw, budget: float, *, within_nats: float) -> tuple[Allocation, ...]:
        """Shapes that can be built whose expected loss is within `within_nats` of the best one's.

        Best first. Shapes up to four times as wide and deep as the free optimum are tried.
        """
        match self.shapes:
            case Lattice(head_width=head_width, heads_multiple=multiple):
                unit = head_width * multiple
            case other:
                raise ValueError(
                    f"shapes={other} has no list of shapes that can be built; plan with "
                    "shapes=Lattice(head_width=..., heads_multiple=...)"
                )
        self._refuse_blind(law)
        free = self._zoom(law, budget, lambda w, d: (w, d), 2)
        widths = unit * np.arange(1, max(2, math.ceil(4 * free.width / unit)) + 1)
        depths = np.arange(1, max(2, math.ceil(4 * free.depth)) + 1)
        grid = np.meshgrid(widths.astype(float), depths.astype(float), indexing="ij")
        width, depth = grid[0].ravel(), grid[1].ravel()
        tokens = self.cost.tokens(self.architecture, width, depth, budget)
        loss = self.loss(law, width, depth, tokens)
        order = np.argsort(loss)
        kept = order[loss[order] <= loss[order[0]] + within_nats]
        return tuple(
            self._at(law, budget, float(width[row]), float(depth[row]), at_edge=free.at_edge)
            for row in kept
        )

    def overtrained(
        self, law: PowerLaw, budget: float, factors: Sequence[float]
    ) -> tuple[Allocation, ...]:
        """The best shape where tokens per parameter is a multiple of the optimal ratio.

        The budget stays: tokens rise by the square root of the factor and the cost per token falls
        by it, as in the paper's section on overtraining.
        """
        optimum = self.allocate(law, budget)
        plans = []
        for factor in factors:
            if not factor > 0:
                raise ValueError(f"factor={factor} must be positive; 4 trains four times as long")
            tokens = optimum.tokens * math.sqrt(factor)
            width = np.geomspace(*WIDTHS, 20_001)
            depth = self._depth(width, tokens, budget, optimum.aspect)
            real = np.isfinite(depth)
            loss = self.loss(law, width[real], depth[real], np.full(int(real.sum()), tokens))
            best = int(np.argmin(loss))
            plans.append(
                self._at(
                    law, budget, float(width[real][best]), float(depth[real][best]), at_edge=False
                )
            )
        return tuple(plans)

    def _depth(
        self, width: Float[np.ndarray, " node"], tokens: float, budget: float, aspect: float
    ) -> Float[np.ndarray, " node"]:
        """Depth at which each width spends the budget on `tokens`; NaN where there is none.

        The cost per token is affine in depth for both FLOP counts. Under an `Aspect` only the
        width that lies on it remains.
        """
        match self.cost:
            case DeviceHours():
                raise ValueError(
                    "overtraining is planned at fixed FLOPs; use cost=Compute() or SixNT()"
                )
            case Compute() | SixNT():
                pass
        ones = np.ones_like(width)
        shallow = 1 / self.cost.tokens(self.architecture, width, ones, budget)
        deeper = 1 / self.cost.tokens(self.architecture, width, 2 * ones, budget)
        depth = 1 + (1 / tokens - shallow) / (deeper - shallow)
        depth = np.where(depth >= 1, depth, np.nan)
        match self.shapes:
            case Aspect():
                off = np.abs(np.log(width / (depth * aspect)))
                return np.where(off <= np.nanmin(off), depth, np.nan)
            case Free() | Lattice():
                return depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A prescription with intervals from the draws of a bootstrap."""

    best: Allocation
    parameters: Interval
    tokens: Interval
    aspect: Interval
    tokens_per_parameter: Interval
    loss_nats: Interval
    share_at_edge: float
    """Draws for which the search window decided; above `MOST_AT_EDGE`, do not read the band."""
    beyond_largest_run: float
    """Budget over that of the largest run; above one is extrapolation."""


def allocate(
    fit: ParametricFit,
    draws: Bootstrap,
    planner: Planner,
    budget: float,
    *,
    level: float = 0.95,
) -> Band:
    """The optimum of the fit, with intervals over the draws.

    Warns:
        LawWarning: The budget is more than `FAR` times that of the largest run.
    """
    best = planner.allocate(fit.estimate, budget)
    plans = [planner.allocate(estimate, budget) for estimate in draws.estimates]
    match planner.cost:
        case Compute():
            largest = float(fit.table.flops().max())
        case SixNT():
            largest = float(fit.table.resource("flops_6nt").max())
        case DeviceHours():
            largest = float(fit.table.column("gpu_hours").max())
    if budget > FAR * largest:
        warnings.warn(
            f"budget {budget:.3g} is {budget / largest:.0f} times that of the largest run of "
            f"{fit.table.source}; past {FAR:g} times a fitted law is a guess",
            LawWarning,
            stacklevel=2,
        )

    def interval(name: str) -> Interval:
        return percentile_interval(np.asarray([getattr(plan, name) for plan in plans]), level)

    return Band(
        best=best,
        parameters=interval("parameters"),
        tokens=interval("tokens"),
        aspect=interval("aspect"),
        tokens_per_parameter=interval("tokens_per_parameter"),
        loss_nats=interval("loss_nats"),
        share_at_edge=float(np.mean([plan.at_edge for plan in plans])),
        beyond_largest_run=budget / largest,
    )


def doubts_of_shape(fit: ParametricFit, band: Band) -> tuple[str, ...]:
    """Reasons for which a table does not identify the optimal shape; none where it does.

    A law in width and depth can be fitted to runs in which shape plays no part: it has an optimum all the
    same. Its shape may be read only if all five hold:

    - the best descent rests, so that it is an optimum;
    - as many descents as the solver asks for agree, so that there is one optimum to speak of;
    - no term of width or depth has run to its bound, where it drops out of the law;
    - the law and not the edge of the search window decides, for the fit and for 95 % of the draws;
    - the interval of width over depth, over the draws of runs, spans less than a factor of ten.
    """
    certificate = fit.certificate
    gone = [name for name in certificate.at_bound if name.split()[-1] in ("width", "depth")]
    span = band.aspect.high / band.aspect.low
    doubts = {
        f"the best descent does not rest: its relative gradient is {certificate.relative_gradient:.1e}": (
            not certificate.rests
        ),
        f"only {certificate.agreeing} of {certificate.starts} descents agree, fewer than "
        f"{CONFIRMATIONS}": certificate.agreeing < CONFIRMATIONS,
        f"at its bound: {', '.join(gone)}": bool(gone),
        f"the optimum lies at the edge of the shapes searched in {band.share_at_edge:.0%} of the draws"
        + (" and in the fit" if band.best.at_edge else ""): band.best.at_edge
        or band.share_at_edge > MOST_AT_EDGE,
        f"the interval of width/depth, {band.aspect.low:.3g} to {band.aspect.high:.3g}, spans more than a "
        f"factor of {WIDEST_ASPECT:g}": not span <= WIDEST_ASPECT,
    }
    return tuple(reason for reason, holds in doubts.items() if holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredThroughput:
    """FLOPs per device-second as a power of width and of depth, fitted to measured runs."""

    architecture: Architecture
    log_rate: float
    width_exponent: float
    depth_exponent: float
    residual_sd: float
    """Standard deviation of the log rate about the fit: how much job layouts differed."""

    def __call__(
        self, width: Float[np.ndarray, "*shape"], depth: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """Tokens per device-second."""
        rate = self.log_rate + self.width_exponent * np.log(width)
        rate = rate + self.depth_exponent * np.log(depth)
        return np.exp(rate) / self.architecture.flops_per_token(width, depth)

    @classmethod
    def of(cls, table: RunTable) -> MeasuredThroughput:
        """Least squares over runs, one row each, from `gpu_hours` at each run's last row.

        Raises:
            ValueError: Fewer than four runs, or the architecture is unknown.
        """
        if isinstance(table.architecture, UnknownArchitecture):
            raise ValueError(
                f"the architecture of {table.source} is unknown, so its FLOPs cannot be counted; pass "
                "architecture=Architecture(...) when reading it"
            )
        names, index = table.groups("run")
        if len(names) < 4:
            raise ValueError(
                f"{table.source} has {len(names)} runs, and a rate over width and depth needs 4; add "
                "timed runs, or give a throughput function"
            )
        last = np.asarray([np.flatnonzero(index == run)[-1] for run in range(len(names))])
        seconds = table.column("gpu_hours")[last] * 3600
        rate = np.log(table.flops()[last] / seconds)
        w, d = np.log(table.column("width")[last]), np.log(table.column("depth")[last])
        design = np.stack([np.ones_like(w), w, d], axis=1)
        solution = np.linalg.lstsq(design, rate, rcond=None)[0]
        residual = rate - design @ solution
        return cls(
            architecture=table.architecture,
            log_rate=float(solution[0]),
            width_exponent=float(solution[1]),
            depth_exponent=float(solution[2]),
            residual_sd=float(residual.std(ddof=3)),
        )
