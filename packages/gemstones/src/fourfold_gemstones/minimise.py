"""The global minimum of the log-Huber objective, and a certificate that says how sure that is.

The solver of `parametric.py`. The objective has many near-flat valleys, so three things are combined:

1. *Seeds by variable projection.* For fixed exponents the law is linear in its coefficients and
   its floor, so a grid over the exponents alone finds every valley with one small linear system
   per node (Golub and Pereyra 1973).
2. *Homotopy in the Huber threshold.* At a wide threshold the problem is nearly least squares; the
   threshold then shrinks to its target while all starts are followed together.
3. *Damped Newton steps* with the exact second derivative, on centred inputs and without any
   absolute tolerance, until the objective no longer moves in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from jaxtyping import Bool, Float

MAX_EXPONENT = 30.0
"""Upper bound of an exponent; a variable that barely moves lets its exponent run away."""
VANISHED = 40.0
"""A term is zero to double precision once its logarithm lies this far below that of the loss."""
AGREEMENT = 1e-6
"""Relative distance of objectives below which two starts count as one optimum."""
WIDEST_DELTA = 3e-2
"""Huber threshold at which the homotopy starts: above nearly every residual of a sensible law."""
SHRINK = 0.3
"""Factor between successive thresholds of the homotopy."""
MAX_LOG_TERM = 60.0
"""Logarithm at which a term is cut off, so that a wild trial step is rejected, not an overflow."""
PATIENCE = 12
"""Steps without progress after which a descent is done; fewer on the way to the last threshold."""
SETTLING = 150
"""The same for the best descent, which alone goes on until it rests: along a term that vanishes it creeps."""
LARGEST_GRADIENT = 1e-4
"""Relative gradient above which a descent has not come to rest, and is no minimum."""
NOISE_FREE = 1e-20
"""An objective below this is that of a table without noise: rounding errors, as is its gradient."""
CONFIRMATIONS = 3
"""Descents that must agree on the best objective before no further seeds are tried."""
MOST_DOUBLINGS = 2
"""Doublings of the number of starts, at most, for the sake of `CONFIRMATIONS`."""
BATCH = 64
"""Draws of a bootstrap that descend together: as many as whose terms stay in a core's cache."""
SEED_EXPONENTS = {1: 48, 2: 24, 3: 12, 4: 8}
"""Grid nodes per exponent, by number of terms: between 48 and 4096 nodes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Facts about an optimum beyond its value: how many descents agree, and how sharp it is."""

    starts: int
    """Descents that were followed to the end."""
    agreeing: int
    """Descents that ended within `AGREEMENT` of the best objective."""
    basins: tuple[float, ...]
    """Distinct final objectives relative to the best, ascending, the best itself (0.0) first."""
    relative_gradient: float
    """Largest decrease per unit of any parameter not at a bound, over the objective."""
    condition: float
    """Condition number of the Jacobian after its columns are scaled to unit length."""
    at_bound: tuple[str, ...]
    """Parameters that ended at a bound: exponents at 0, terms or floor that vanished."""

    @property
    def isolated(self) -> bool:
        """True where the best descent rests, at least two agree and no parameter sits at a bound."""
        return self.rests and self.agreeing >= 2 and not self.at_bound

    @property
    def rests(self) -> bool:
        """True where the gradient has vanished, as it does at a minimum."""
        return self.relative_gradient <= LARGEST_GRADIENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Minimise sum_i w_i huber_delta(log L_i - log(exp(E) + sum_j exp(c_j - e_j x_ij))).

    `scipy.special.huber`'s convention: quadratic with curvature one inside `delta`, a sum and not
    a mean.
    """

    log_inputs: Float[np.ndarray, "row term"]
    log_loss: Float[np.ndarray, " row"]
    delta: float
    overestimate: float = 1.0
    """Factor on rows whose loss lies below the law; above 1 the law becomes a frontier."""
    nats: bool = False
    """Residuals are differences of losses, L - Lhat in nats, and not of their logarithms."""

    @property
    def centre(self) -> Float[np.ndarray, " term"]:
        """Mean of each input; descents run on centred inputs."""
        return self.log_inputs.mean(axis=0)

    def centred(self, theta: Parameters) -> Parameters:
        """The same laws on centred inputs, within the bounds."""
        m = self.log_inputs.shape[1]
        moved = np.array(theta)
        moved[:, :m] -= moved[:, m : 2 * m] * self.centre
        return np.clip(moved, *self.bounds())

    def uncentred(self, theta: Parameters) -> Parameters:
        """The inverse of `centred`."""
        m = self.log_inputs.shape[1]
        moved = np.array(theta)
        moved[:, :m] += moved[:, m : 2 * m] * self.centre
        return moved

    def descent(
        self,
        weights: Float[np.ndarray, "draw row"],
        log_loss: Float[np.ndarray, "*draw row"] | None = None,
    ) -> Descent:
        """The objective on centred inputs, of other losses where they are given."""
        return Descent(
            self.log_inputs - self.centre,
            self.log_loss if log_loss is None else log_loss,
            weights,
            overestimate=self.overestimate,
            nats=self.nats,
        )

    def bounds(self) -> Bounds:
        """Exponents in [0, MAX_EXPONENT]; coefficients and floor may vanish but not below that."""
        return bounds(self.log_loss, self.log_inputs.shape[1])

    def seeds(self, starts: int) -> Parameters:
        """Starts on centred inputs, by variable projection."""
        return seeds(self, np.ones(len(self.log_loss)), starts)

    @property
    def vanishing(self) -> tuple[int, ...]:
        """Positions of the logarithms of terms and floor."""
        m = self.log_inputs.shape[1]
        return (*range(m), 2 * m)


class Smooth(Protocol):
    """A problem that `minimise` solves: a law's objective over a table, and where to begin."""

    @property
    def log_loss(self) -> Float[np.ndarray, " row"]:
        """Log of the measured losses."""
        ...

    @property
    def delta(self) -> float:
        """Huber threshold of log loss."""
        ...

    @property
    def vanishing(self) -> tuple[int, ...]:
        """Positions of the parameters that are logarithms of terms, and may vanish."""
        ...

    def centred(self, theta: Parameters, /) -> Parameters:
        """Parameters as the descents have them."""
        ...

    def uncentred(self, theta: Parameters, /) -> Parameters:
        """Parameters as the law has them."""
        ...

    def descent(
        self,
        weights: Float[np.ndarray, "draw row"],
        log_loss: Float[np.ndarray, "*draw row"] | None = None,
        /,
    ) -> Downhill:
        """The objective in the descents' parameters, of other losses where they are given."""
        ...

    def bounds(self) -> Bounds:
        """Of the descents' parameters."""
        ...

    def seeds(self, starts: int, /) -> Parameters:
        """Starts, in the descents' parameters."""
        ...


Parameters = Float[np.ndarray, "start parameter"]
"""Rows (c_1..c_m, e_1..e_m, E)."""
Bounds = tuple[Float[np.ndarray, " parameter"], Float[np.ndarray, " parameter"]]
"""Lower and upper."""


def huber(
    residual: Float[np.ndarray, "*shape"], delta: float | Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Huber's function: r²/2 within `delta`, delta (|r| - delta/2) beyond."""
    inner = np.minimum(np.abs(residual), delta)
    return inner * (np.abs(residual) - 0.5 * inner)


def objective(
    problem: Problem, parameters: Parameters, weights: Float[np.ndarray, "draw row"]
) -> Float[np.ndarray, " start"]:
    """The objective at each row of `parameters` (inputs not centred); weights broadcast."""
    descent = Descent(
        problem.log_inputs,
        problem.log_loss,
        weights,
        overestimate=problem.overestimate,
        nats=problem.nats,
    )
    return descent.value(parameters, problem.delta)


Derivatives = tuple[
    Float[np.ndarray, "start parameter"],
    Float[np.ndarray, "start parameter parameter"],
    Float[np.ndarray, "start parameter"],
]
"""Gradient, Hessian, and a positive scale for each parameter."""


class Downhill(Protocol):
    """An objective that `descend` can lower: values and derivatives of many starts at once."""

    def value(self, theta: Parameters, delta: float, /) -> Float[np.ndarray, " start"]:
        """The objective of every start."""
        ...

    def derivatives(self, theta: Parameters, delta: float, /) -> Derivatives:
        """Gradient, Hessian and scale of every start."""
        ...

    def slopes(self, theta: Parameters, /) -> Float[np.ndarray, "start parameter row"]:
        """Derivative of the log prediction of every row."""
        ...

    def select(self, keep: Bool[np.ndarray, " start"], /) -> Self:
        """The same objective for some of the starts."""
        ...


@dataclass(frozen=True, slots=True)
class Descent:
    """The log-Huber objective of many starts at once, on whatever inputs it is given."""

    log_inputs: Float[np.ndarray, "row term"]
    log_loss: Float[np.ndarray, "*draw row"]
    """Of every start the same, or its own."""
    weights: Float[np.ndarray, "draw row"]
    overestimate: float = 1.0
    nats: bool = False

    def left(self, total: Float[np.ndarray, "start row"]) -> Float[np.ndarray, "start row"]:
        """Residuals of predictions in nats."""
        return np.exp(self.log_loss) - total if self.nats else self.log_loss - np.log(total)

    def sided(self, residual: Float[np.ndarray, "start row"]) -> Float[np.ndarray, "start row"]:
        """The weights, with the factor of rows that the law overestimates."""
        if self.overestimate == 1.0:
            return self.weights
        return self.weights * np.where(residual < 0, self.overestimate, 1.0)

    def slopes(self, theta: Parameters) -> Float[np.ndarray, "start parameter row"]:
        """Derivative of the log prediction of every row."""
        return self.jacobian(theta)[2]

    def terms(self, theta: Parameters) -> Float[np.ndarray, "start all_terms row"]:
        """Exp of every term, the floor last."""
        m = self.log_inputs.shape[1]
        exponent = np.empty((len(theta), m + 1, len(self.log_inputs)))
        np.multiply(-theta[:, m : 2 * m, None], self.log_inputs.T[None], out=exponent[:, :m])
        exponent[:, :m] += theta[:, :m, None]
        exponent[:, m] = theta[:, 2 * m, None]
        np.minimum(exponent, MAX_LOG_TERM, out=exponent)
        return np.exp(exponent, out=exponent)

    def value(self, theta: Parameters, delta: float) -> Float[np.ndarray, " start"]:
        """The objective of every start."""
        residual = self.left(self.terms(theta).sum(axis=1))
        return (self.sided(residual) * huber(residual, delta)).sum(axis=1)

    def jacobian(
        self, theta: Parameters
    ) -> tuple[
        Float[np.ndarray, "start row"],
        Float[np.ndarray, "start all_terms row"],
        Float[np.ndarray, "start parameter row"],
    ]:
        """Predictions in nats, share of each term in the prediction, derivative of log prediction."""
        m = self.log_inputs.shape[1]
        share = self.terms(theta)
        total = share.sum(axis=1)
        share /= total[:, None]
        slope = np.empty((len(theta), 2 * m + 1, len(self.log_inputs)))
        slope[:, :m] = share[:, :m]
        np.multiply(share[:, :m], -self.log_inputs.T[None], out=slope[:, m : 2 * m])
        slope[:, 2 * m] = share[:, m]
        return total, share, slope

    def derivatives(self, theta: Parameters, delta: float) -> Derivatives:
        """Gradient, exact Hessian, and a positive scale per parameter (majorising diagonal).

        With r the residuals, f the log prediction, s its derivative and p = r clipped to delta:

            gradient = -sum p s
            Hessian  =  sum [|r| <= delta] s sᵀ - sum p d²f

        The prediction is a sum of exponentials, each with a share of it. So d²f is the sum of
        share * a aᵀ over the terms, less s sᵀ, where a is the derivative of a term's logarithm:
        1 for its coefficient, -x for its exponent. Of residuals in nats, the prediction itself takes the
        place of its logarithm, and the last term falls away.
        """
        m = self.log_inputs.shape[1]
        total, share, slope = self.jacobian(theta)
        residual = self.left(total)
        weights = self.sided(residual)
        pull = weights * np.clip(residual, -delta, delta)
        curvature = weights * (np.abs(residual) <= delta)
        if self.nats:  # the derivative of a prediction is it times that of its logarithm
            pull *= total
            curvature *= total * total
        gradient = -np.einsum("bpn,bn->bp", slope, pull)
        bend = curvature if self.nats else curvature + pull
        hessian = (slope * bend[:, None]) @ slope.transpose(0, 2, 1)
        pulled = share * pull[:, None]
        x = self.log_inputs
        zeroth = pulled.sum(axis=2)
        first = np.einsum("bjn,nj->bj", pulled[:, :m], x)
        second = np.einsum("bjn,nj->bj", pulled[:, :m], x * x)
        # share * a aᵀ: coefficients, coefficient with exponent, exponents; last the floor.
        j = np.arange(m)
        hessian[:, j, j] -= zeroth[:, :m]
        hessian[:, j, m + j] += first
        hessian[:, m + j, j] += first
        hessian[:, m + j, m + j] -= second
        hessian[:, 2 * m, 2 * m] -= zeroth[:, m]
        # Huber's function lies under a parabola of this curvature, so that the scale does not
        # vanish where all residuals are beyond delta and the Hessian's first sum is zero.
        majorised = weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        if self.nats:
            majorised *= total * total
        scale = np.einsum("bpn,bpn,bn->bp", slope, slope, majorised)
        return gradient, hessian, scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300

    def select(self, keep: Bool[np.ndarray, " start"]) -> Descent:
        """The same problem for some of the starts."""
        weights = self.weights if len(self.weights) == 1 else self.weights[keep]
        losses = self.log_loss if self.log_loss.ndim == 1 else self.log_loss[keep]
        return replace(self, log_loss=losses, weights=weights)


def descend(
    objective: Downhill,
    theta: Parameters,
    delta: float,
    *,
    lower: Float[np.ndarray, " parameter"],
    upper: Float[np.ndarray, " parameter"],
    steps: int,
    tolerance: float,
    patience: int,
) -> tuple[Parameters, Float[np.ndarray, " start"]]:
    """Damped projected Newton steps from every start; each accepted step lowers its objective.

    All starts step together, each with a damping of its own. In one step, for those still moving:

    1. Derivatives, of the starts whose last step was accepted; the others stand where they stood.
    2. A parameter at its bound whose gradient points outwards is stuck: its row leaves the system.
    3. The system is scaled to unit diagonal, solved with damping (`_damped_step`), and the step
       clipped to the bounds.
    4. Where the objective fell, the start moves and trusts the next step more; elsewhere it stays
       and damps more. So the same Hessian is tried with shorter steps until one goes down.
    5. A start is done once it gained less than `tolerance` of its objective for `patience` steps,
       or once an undamped Newton step would gain less than a tenth of that.

    Args:
        objective: what is lowered.
        theta: where the starts stand; not changed.
        delta: Huber threshold.
        lower: of each parameter.
        upper: of each parameter.
        steps: at most as many.
        tolerance: gain over the objective that counts as none.
        patience: steps without gain after which a start is done.
    """
    theta = theta.copy()
    value = objective.value(theta, delta)
    damping = np.full(len(theta), 1e-3)
    idle = np.zeros(len(theta), dtype=int)
    moving = np.ones(len(theta), dtype=bool)
    fresh = np.ones(len(theta), dtype=bool)  # moved since its derivatives were taken
    p = theta.shape[1]
    kept_gradient = np.empty_like(theta)
    kept_hessian = np.empty((len(theta), p, p))
    kept_scale = np.empty_like(theta)
    for _ in range(steps):
        # 1. Derivatives where they are stale.
        stale = moving & fresh
        if stale.any():
            derivatives = objective.select(stale).derivatives(theta[stale], delta)
            kept_gradient[stale], kept_hessian[stale], kept_scale[stale] = derivatives
        here, gradient, scale = theta[moving], kept_gradient[moving], kept_scale[moving]
        hessian = kept_hessian[moving]
        # 2. Bounds: a projected step leaves stuck parameters alone.
        stuck = ((here <= lower) & (gradient > 0)) | ((here >= upper) & (gradient < 0))
        gradient = np.where(stuck, 0.0, gradient)
        # 3. The step, in units in which every parameter bends the objective alike; at most 5 long.
        root = np.sqrt(scale)
        hessian = hessian / (root[:, :, None] * root[:, None, :])
        hessian = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, hessian)
        step, decrement = _damped_step(hessian, gradient / root, damping[moving])
        step /= root
        trial = np.clip(here + np.clip(step, -5.0, 5.0), lower, upper)
        # 4. Accept what goes down.
        reached = objective.select(moving).value(trial, delta)
        before = value[moving]
        better = reached < before
        theta[moving] = np.where(better[:, None], trial, here)
        value[moving] = np.where(better, reached, before)
        damping[moving] = np.clip(damping[moving] * np.where(better, 0.15, 6.0), 1e-12, 1e14)
        fresh[moving] = better
        # 5. Who is done. `moving` changes last, since it selects all of the above.
        gained = before - np.minimum(reached, before)
        idle[moving] = np.where(gained > tolerance * before, 0, idle[moving] + 1)
        done = (idle[moving] >= patience) | (decrement <= 0.1 * tolerance * before)
        moving[moving] = ~done
        if not moving.any():
            break
    return theta, value


def _damped_step(
    hessian: Float[np.ndarray, "start parameter parameter"],
    gradient: Float[np.ndarray, "start parameter"],
    damping: Float[np.ndarray, " start"],
) -> tuple[Float[np.ndarray, "start parameter"], Float[np.ndarray, " start"]]:
    """Minus the inverse of (|eigenvalues| + damping) applied to the gradient: always downhill.

    Beside it, Newton's decrement: what an undamped step would gain, the test of convergence.
    """
    values, vectors = np.linalg.eigh(hessian)
    along = np.einsum("bpk,bp->bk", vectors, gradient)
    steepness = np.maximum(np.abs(values), 1e-12)
    step = -np.einsum("bpk,bk->bp", vectors, along / (steepness + damping[:, None]))
    return step, 0.5 * np.einsum("bk,bk->b", along, along / steepness)


def bounds(
    log_loss: Float[np.ndarray, " row"], terms: int
) -> tuple[Float[np.ndarray, " parameter"], Float[np.ndarray, " parameter"]]:
    """Exponents in [0, MAX_EXPONENT]; coefficients and floor may vanish but not below that."""
    vanished = float(log_loss.min()) - VANISHED
    lower = np.r_[np.full(terms, vanished), np.zeros(terms), vanished]
    upper = np.r_[np.full(terms, MAX_LOG_TERM), np.full(terms, MAX_EXPONENT), MAX_LOG_TERM]
    return lower, upper


def seeds(problem: Problem, weights: Float[np.ndarray, " row"], starts: int) -> Parameters:
    """The best nodes of a grid over exponents, apart from each other, on centred inputs.

    At each node the coefficients and the floor are the non-negative least-squares solution for
    relative residuals: rows divided by the loss, so that they agree with log residuals to first
    order. With `m` terms and `k` nodes of each exponent there are `k^m` systems of `m + 1`
    equations, and all are cut from one Gram matrix:

    1. A column for each term and node, exp(-e x) over the loss, and one of the floor: `m k + 1`.
    2. The Gram matrix of all columns; a node of the grid picks its `m + 1` rows and columns.
    3. Solve all systems; rank nodes by their squared error, for which no row is looked at again.
    4. Rank the best few hundred once more by absolute log error, which is nearer to the objective.
    5. Take them in this order, leaving out those close to what is already taken.

    Args:
        problem: what is minimised.
        weights: of the rows.
        starts: nodes to take; fewer where the grid has fewer that are apart.
    """
    m = problem.log_inputs.shape[1]
    x = problem.log_inputs - problem.centre
    spread = np.maximum(x.std(axis=0), 1e-9)
    # 1. Exponents between nearly logarithmic and steep, relative to how far each variable ranges.
    nodes = SEED_EXPONENTS.get(m, 5)
    grid = np.geomspace(0.05, 1.3, nodes)[:, None] / np.maximum(spread, 0.4) * 0.9  # [node, term]
    loss = np.exp(problem.log_loss)
    features = np.exp(-grid.T[:, :, None] * x.T[:, None, :]).reshape(m * nodes, -1)
    features = np.vstack([features, np.ones(len(loss))]) / loss  # [column, row]
    # 2. Column `j * nodes + i` is term j at its node i; the last is the floor.
    gram = (features * weights) @ features.T
    target = (features * weights).sum(axis=1)
    index = np.stack(np.meshgrid(*[np.arange(nodes)] * m, indexing="ij"), axis=-1).reshape(-1, m)
    picked = np.c_[index + nodes * np.arange(m), np.full(len(index), m * nodes)]
    system = gram[picked[:, :, None], picked[:, None, :]]
    # 3. |A c - 1|² = c' G c - 2 c' t, but for a constant.
    amplitude = nonnegative(system, target[picked])
    quadratic = np.einsum("gi,gij,gj->g", amplitude, system, amplitude)
    quadratic -= 2 * np.einsum("gi,gi->g", amplitude, target[picked])
    shortlist = np.argsort(quadratic)[: max(40, 12 * starts)]
    # 4. Prediction over loss is one where the law is right.
    predicted = np.einsum("gj,gjn->gn", amplitude[shortlist], features[picked[shortlist]])
    score = np.abs(np.log(np.maximum(predicted, 1e-12))) @ weights
    # 5. Apart: in logarithms of the exponents, so that neighbours on the grid differ enough.
    chosen: list[int] = []
    log_grid = np.log(grid)
    for node in shortlist[np.argsort(score)]:
        here = log_grid[index[node], np.arange(m)]
        others = [log_grid[index[other], np.arange(m)] for other in chosen]
        if all(np.linalg.norm(here - other) > 0.12 for other in others):
            chosen.append(int(node))
        if len(chosen) == starts:
            break
    exponents = grid[index[chosen], np.arange(m)]
    # A coefficient of zero has no logarithm, and a descent could not leave it.
    floor = 1e-3 * float(np.exp(problem.log_loss.min()))
    return np.c_[
        np.log(np.maximum(amplitude[chosen][:, :m], floor)),
        exponents,
        np.log(np.maximum(amplitude[chosen][:, m], floor)),
    ]


def nonnegative(
    system: Float[np.ndarray, "node term term"], target: Float[np.ndarray, "node term"]
) -> Float[np.ndarray, "node term"]:
    """Solve many small least-squares problems under non-negativity: exact where nothing binds.

    Where the free solution has a negative entry, sixty rounds of coordinate descent from its positive part:
    each entry in turn is set to its best value given the others, or to zero.
    """
    k = system.shape[-1]
    trace = np.trace(system, axis1=1, axis2=2)[:, None, None]
    ridge = system + 1e-10 * trace * np.eye(k)
    solution = np.linalg.solve(ridge, target[..., None])[..., 0]
    binding = (solution < 0).any(axis=1)
    inner = np.maximum(solution[binding], 0.0)
    small, aim = ridge[binding], target[binding]
    for _ in range(60):
        for j in range(k):
            rest = (
                aim[:, j] - np.einsum("gk,gk->g", small[:, j], inner) + small[:, j, j] * inner[:, j]
            )
            inner[:, j] = np.maximum(rest / small[:, j, j], 0.0)
    solution[binding] = inner
    return solution


def thresholds(delta: float) -> tuple[float, ...]:
    """The Huber thresholds of the homotopy, widest first, the target last."""
    steps = max(0, int(np.ceil(np.log(delta / WIDEST_DELTA) / np.log(SHRINK))))
    return tuple(delta * SHRINK**-k for k in range(steps, -1, -1))


def follow(
    problem: Smooth,
    theta: Parameters,
    weights: Float[np.ndarray, "draw row"],
    log_loss: Float[np.ndarray, "*draw row"] | None = None,
) -> tuple[Parameters, Float[np.ndarray, " start"]]:
    """Follow centred starts from the widest threshold to the target."""
    lower, upper = problem.bounds()
    theta = np.clip(theta, lower, upper)
    descent = problem.descent(weights, log_loss)
    limits = {"lower": lower, "upper": upper}
    with np.errstate(over="ignore"):  # a wild trial step is infinitely bad, and rejected
        for delta in thresholds(problem.delta)[:-1]:
            theta, _ = descend(
                descent, theta, delta, **limits, steps=25, tolerance=1e-5, patience=6
            )
        return descend(
            descent, theta, problem.delta, **limits, steps=200, tolerance=1e-13, patience=PATIENCE
        )


def settle(
    problem: Smooth, theta: Float[np.ndarray, " parameter"]
) -> tuple[Float[np.ndarray, " parameter"], float]:
    """One centred descent taken on at the target threshold until it rests."""
    lower, upper = problem.bounds()
    settled, value = descend(
        problem.descent(np.ones((1, len(problem.log_loss)))),
        theta[None],
        problem.delta,
        lower=lower,
        upper=upper,
        steps=20 * SETTLING,
        tolerance=1e-13,
        patience=SETTLING,
    )
    return settled[0], float(value[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best parameters of all descents, their objective, and the certificate."""

    parameters: Float[np.ndarray, " parameter"]
    objective: float
    certificate: Certificate


def minimise(problem: Smooth, *, starts: int, names: tuple[str, ...]) -> Optimum:
    """Follow `starts` seeds to the end, more where few of them agree; settle and certify the best.

    `names` are the parameters' own, for the certificate.
    """
    ones = np.ones((1, len(problem.log_loss)))
    tried = 0
    theta, value = np.empty((0, len(names))), np.empty(0)
    for doubling in range(MOST_DOUBLINGS + 1):
        fresh = problem.seeds(starts * 2**doubling)[tried:]
        tried += len(fresh)
        fresh, reached = follow(problem, fresh, ones)
        theta, value = np.concatenate([theta, fresh]), np.concatenate([value, reached])
        if (value <= value.min() * (1 + AGREEMENT)).sum() >= min(CONFIRMATIONS, starts):
            break
    best = int(np.argmin(value))
    theta[best], value[best] = settle(problem, theta[best])
    return Optimum(
        parameters=problem.uncentred(theta[best][None])[0],
        objective=float(value[best]),
        certificate=certify(problem, theta[best], value, names),
    )


def certify(
    problem: Smooth,
    centred: Float[np.ndarray, " parameter"],
    values: Float[np.ndarray, " start"],
    names: tuple[str, ...],
) -> Certificate:
    """The certificate that the final objectives of all starts and the derivatives at the best give."""
    best = float(values.min())
    excess = np.sort(values) / max(best, 1e-300) - 1
    if best < NOISE_FREE:
        excess = np.where(np.sort(values) < 1e-18, 0.0, np.inf)
    basins = [0.0]
    for gap in excess:
        if gap > basins[-1] + AGREEMENT and np.isfinite(gap):
            basins.append(float(gap))
    lower, upper = problem.bounds()
    bound = (centred <= lower + 1e-9) | (centred >= upper - 1e-9)
    logs = list(problem.vanishing)
    bound[logs] |= centred[logs] <= lower[logs] + 0.5 * VANISHED
    descent = problem.descent(np.ones((1, len(problem.log_loss))))
    gradient, _, _ = descent.derivatives(centred[None], problem.delta)
    steepest = float(np.abs(gradient[0][~bound]).max(initial=0.0))
    free = descent.slopes(centred[None])[0][~bound]
    lengths = np.linalg.norm(free, axis=1)
    columns = free[lengths > 0] / lengths[lengths > 0, None]
    return Certificate(
        starts=len(values),
        agreeing=int((excess < AGREEMENT).sum()),
        basins=tuple(basins),
        relative_gradient=0.0 if best < NOISE_FREE else steepest / best,
        condition=float(np.linalg.cond(columns)),
        at_bound=tuple(label for label, at in zip(names, bound, strict=True) if at),
    )


def refit(
    problem: Smooth,
    parameters: Float[np.ndarray, " parameter"],
    weights: Float[np.ndarray, "draw row"],
    *,
    log_losses: Float[np.ndarray, "draw row"] | None = None,
    batch: int = BATCH,
) -> Parameters:
    """Best parameters under each row of weights, and of losses where they are given, from the full fit.

    Each draw starts from the optimum of all rows, at the widest threshold of the homotopy, where
    the problem has nearly lost its other basins.
    """
    start = problem.centred(parameters[None])
    batches = []
    for first in range(0, len(weights), batch):
        some = weights[first : first + batch]
        losses = None if log_losses is None else log_losses[first : first + batch]
        theta, _ = follow(problem, np.repeat(start, len(some), axis=0), some, losses)
        batches.append(theta)
    return problem.uncentred(np.concatenate(batches))
