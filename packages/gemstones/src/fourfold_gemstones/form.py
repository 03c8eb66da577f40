"""Any law that is a sum of positive terms, fitted by the solver of `minimise.py`.

A `Form` says which terms there are and how they depend on the variables, as one function of tensors; the
solver takes its gradient and second derivatives from that function, exactly. So a law is one file of
`registry/`. Power laws, whose derivatives are simple, have a solver of their own in `parametric.py`; they and
these are estimators alike.

    log L(x) = logsumexp(c_1 + h_1(s, x), ..., c_m + h_m(s, x), E)

with log amplitudes c in log nats, shape parameters s, and a floor E. Variables enter as logarithms over a
reference, the table's geometric mean, so that exp(c) is the size of a term in nats at the middle of the
table, and no parameter has a unit that depends on another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import qmc
from torch import Tensor

from fourfold_gemstones import minimise
from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.laws import Settings, Variable
from fourfold_gemstones.minimise import Bounds, Derivatives, Parameters
from fourfold_gemstones.parametric import LawWarning, variable_of, weaknesses
from fourfold_gemstones.runs import RunTable

UNITS: Mapping[Variable, str] = MappingProxyType(
    {
        "parameters": "weights",
        "effective_parameters": "weights",
        "once_parameters": "weights",
        "looped_parameters": "weights",
        "width": "channels",
        "depth": "blocks",
        "tokens": "tokens",
        "unique_tokens": "tokens",
        "loops": "1",
        "learning_rate": "per step",
        "batch_tokens": "tokens per step",
    }
)
"""Variables of one unit share a reference, so that a law may compare them; counts of loops have none."""
ABSOLUTE = "1"
"""The unit of pure numbers, whose reference is one."""
NODES = 2_048
"""Points of the quasi-random grid over shape parameters from which descents are seeded."""
RANKED_ROWS = 400
"""Rows, evenly spaced, by which the grid is ranked."""
APART = 0.05
"""Distance of two seeds in the unit cube of the seeded ranges."""

Logs = Mapping[Variable, Tensor]
"""Log of each variable over its reference, a value a row."""
Shapes = Mapping[str, Tensor]
"""Shape parameters by name, each [start, 1]."""
Amplitudes = Mapping[str, Tensor]
"""Log amplitudes of the terms by name, each [start, 1], for laws whose shapes depend on them."""
Terms = tuple[Tensor, ...]
"""Log of each term over its amplitude, [start, row]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A parameter that is no amplitude: an exponent, a half-life, a place of an optimum."""

    name: str
    meaning: str
    """With its unit, as reports print it."""
    low: float
    high: float
    """Bounds of the descent."""
    seeds: tuple[float, float]
    """Range in which descents begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A law as a sum of positive terms above a floor."""

    variables: tuple[Variable, ...]
    terms: tuple[str, ...]
    """Names of the terms but the floor, each of which has an amplitude."""
    shapes: tuple[Shape, ...]
    log_terms: Callable[[Shapes, Logs, Amplitudes], Terms]
    """The terms, in the order of their names."""
    floored: bool = True
    """Whether a loss remains that no variable removes."""
    example: Mapping[str, float]
    """Plausible parameters by name, which tests simulate: log nats of terms and floor, and shapes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters, in the order of the vector: amplitudes, shapes, floor."""
        floor = ("floor",) if self.floored else ()
        return (*self.terms, *(shape.name for shape in self.shapes), *floor)

    def log_loss(self, theta: Tensor, logs: Logs) -> Float[Tensor, "start row"]:
        """Log of the predicted nats per token."""
        m = len(self.terms)
        amplitudes = {name: theta[:, j, None] for j, name in enumerate(self.terms)}
        shapes = {shape.name: theta[:, m + j, None] for j, shape in enumerate(self.shapes)}
        parts = self.log_terms(shapes, logs, amplitudes)
        whole = [amplitudes[name] + part for name, part in zip(self.terms, parts, strict=True)]
        if self.floored:
            whole.append(theta[:, -1, None])
        stacked = torch.stack(torch.broadcast_tensors(*whole))
        return torch.logsumexp(stacked.clamp(max=minimise.MAX_LOG_TERM), dim=0)


@cache
def _ready() -> None:
    """Take the first forward derivative, at which torch imports its rules with a warning about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.exp, (torch.zeros(1),), (torch.ones(1),))


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormEstimate:
    """A form with values for its parameters, and the references that they count from."""

    form: Form
    values: tuple[float, ...]
    """In the order of `Form.names`; amplitudes and floor are log nats."""
    references: tuple[float, ...]
    """Log of the reference of each variable of the form."""

    def loss(
        self, inputs: Mapping[Variable, Float[np.ndarray, " row"]]
    ) -> Float[np.ndarray, " row"]:
        """Predicted nats per token; inputs in their own units."""
        logs: dict[Variable, Tensor] = {
            name: _tensor(np.log(inputs[name]) - reference)
            for name, reference in zip(self.form.variables, self.references, strict=True)
        }
        with torch.no_grad():
            told = self.form.log_loss(_tensor([self.values]), logs)[0].exp()
        return np.broadcast_to(told.numpy(), np.shape(inputs[self.form.variables[0]])).copy()

    def named(self) -> dict[str, float]:
        """Parameters by name: amplitudes and floor in nats at the reference, shapes as they are."""
        nats = {*self.form.terms, "floor"}
        return {
            name: float(np.exp(value)) if name in nats else value
            for name, value in zip(self.form.names, self.values, strict=True)
        }

    @property
    def log_floor(self) -> float:
        """Log nats that no variable removes; minus infinity where the form has none."""
        return self.values[-1] if self.form.floored else -float("inf")


@dataclass(frozen=True)
class FormProblem:
    """The minimisation that fitting a form to a table is; `minimise.Smooth`."""

    form: Form
    logs: Logs
    log_loss: Float[np.ndarray, " row"]
    delta: float
    overestimate: float = 1.0

    @property
    def vanishing(self) -> tuple[int, ...]:
        """Amplitudes and floor."""
        last = (len(self.form.names) - 1,) if self.form.floored else ()
        return (*range(len(self.form.terms)), *last)

    def centred(self, theta: Parameters) -> Parameters:
        """The same parameters within the bounds: the logs are over their reference already."""
        return np.clip(theta, *self.bounds())

    def uncentred(self, theta: Parameters) -> Parameters:
        """The same parameters."""
        return theta

    def descent(
        self,
        weights: Float[np.ndarray, "draw row"],
        log_loss: Float[np.ndarray, "*draw row"] | None = None,
    ) -> FormDescent:
        """The objective, of other losses where they are given."""
        _ready()
        losses = self.log_loss if log_loss is None else log_loss
        return FormDescent(
            self.form, self.logs, _tensor(losses), _tensor(weights), self.overestimate
        )

    def bounds(self) -> Bounds:
        """Shapes as their form says; terms and floor may vanish, and exceed no loss by far."""
        vanished = float(self.log_loss.min()) - minimise.VANISHED
        most = float(self.log_loss.max()) + 10.0
        m = len(self.form.terms)
        floor = int(self.form.floored)
        low = [vanished] * m + [shape.low for shape in self.form.shapes] + [vanished] * floor
        high = [most] * m + [shape.high for shape in self.form.shapes] + [most] * floor
        return np.asarray(low), np.asarray(high)

    @cached_property
    def _ranked(self) -> Parameters:
        """Nodes over the shapes with their best amplitudes, the best first (see `minimise.seeds`)."""
        form, m = self.form, len(self.form.terms)
        k = len(form.shapes)
        rows = np.unique(np.linspace(0, len(self.log_loss) - 1, RANKED_ROWS).astype(int))
        logs: Logs = {name: values[rows] for name, values in self.logs.items()}
        loss = np.exp(self.log_loss[rows])
        unit = (
            qmc.Sobol(max(k, 1), scramble=False).random(NODES if k else 1)
            if k
            else np.zeros((1, 0))
        )
        low = np.asarray([shape.seeds[0] for shape in form.shapes])
        high = np.asarray([shape.seeds[1] for shape in form.shapes])
        nodes = low + unit * (high - low)
        # Terms that read amplitudes are given a fifth of a nat each at first, then what was solved for.
        columns = m + form.floored
        amplitude = np.full((len(nodes), columns), 0.2)
        features = np.empty((len(nodes), columns, len(rows)))
        for _ in range(2):
            amplitudes = {
                name: _tensor(np.log(np.maximum(amplitude[:, j, None], 1e-6)))
                for j, name in enumerate(form.terms)
            }
            shapes = {shape.name: _tensor(nodes[:, j, None]) for j, shape in enumerate(form.shapes)}
            with torch.no_grad():
                parts = form.log_terms(shapes, logs, amplitudes)
            for j, part in enumerate(parts):
                features[:, j] = np.exp(np.clip(part.numpy(), -60, 60)) / loss
            features[:, m:] = 1 / loss
            system = features @ features.transpose(0, 2, 1)
            amplitude = minimise.nonnegative(system, features.sum(axis=2))
        told = np.einsum("gj,gjn->gn", amplitude, features)
        order = np.argsort(np.abs(np.log(np.maximum(told, 1e-12))).sum(axis=1))
        chosen: list[int] = []
        for node in order[:512]:
            if all(np.linalg.norm(unit[node] - unit[other]) > APART for other in chosen):
                chosen.append(int(node))
        least = 1e-3 * float(loss.min())
        logarithms = np.log(np.maximum(amplitude[chosen], least))
        return np.c_[logarithms[:, :m], nodes[chosen], logarithms[:, m:]]

    def seeds(self, starts: int) -> Parameters:
        """The best nodes that lie apart."""
        return np.clip(self._ranked[:starts], *self.bounds())


@dataclass(frozen=True, slots=True)
class FormDescent:
    """The log-Huber objective of many starts at once; `minimise.Downhill`."""

    form: Form
    logs: Logs
    log_loss: Tensor
    weights: Tensor
    overestimate: float = 1.0

    def _sided(self, residual: Tensor) -> Tensor:
        if self.overestimate == 1.0:
            return self.weights.expand_as(residual)
        return self.weights * torch.where(residual < 0, self.overestimate, 1.0)

    def value(self, theta: Parameters, delta: float) -> Float[np.ndarray, " start"]:
        """The objective of every start; infinite where a form has no value."""
        with torch.no_grad():
            residual = self.log_loss - self.form.log_loss(_tensor(theta), self.logs)
            inner = residual.abs().clamp(max=delta)
            total = (self._sided(residual) * inner * (residual.abs() - inner / 2)).sum(dim=1)
        return np.where(np.isfinite(total.numpy()), total.numpy(), np.inf)

    def _slopes(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Log predictions [start, row] and their derivatives [parameter, start, row]."""
        basis = torch.eye(theta.shape[1], dtype=torch.float64)

        def told(at: Tensor) -> Tensor:
            return self.form.log_loss(at, self.logs)

        def along(direction: Tensor) -> Tensor:
            return torch.func.jvp(told, (theta,), (direction.expand_as(theta),))[1]

        return told(theta), torch.func.vmap(along)(basis)

    def slopes(self, theta: Parameters) -> Float[np.ndarray, "start parameter row"]:
        """Derivative of the log prediction of every row."""
        return self._slopes(_tensor(theta))[1].permute(1, 0, 2).numpy()

    def derivatives(self, theta: Parameters, delta: float) -> Derivatives:
        """Gradient, exact Hessian and majorising diagonal, as `minimise.Descent` has them."""
        at = _tensor(theta)
        told, slopes = self._slopes(at)
        residual = self.log_loss - told
        weights = self._sided(residual)
        pull = weights * residual.clamp(-delta, delta)
        gradient = -torch.einsum("psn,sn->sp", slopes, pull)
        inside = weights * (residual.abs() <= delta)
        hessian = torch.einsum("psn,sn,qsn->spq", slopes, inside, slopes)
        basis = torch.eye(at.shape[1], dtype=torch.float64)

        def pulled(point: Tensor) -> Tensor:
            return (pull * self.form.log_loss(point, self.logs)).sum()

        def bent(direction: Tensor) -> Tensor:
            return torch.func.jvp(torch.func.grad(pulled), (at,), (direction.expand_as(at),))[1]

        hessian = hessian - torch.func.vmap(bent)(basis).permute(1, 0, 2)
        majorised = weights * (delta / residual.abs().clamp(min=1e-300)).clamp(max=1.0)
        scale = torch.einsum("psn,psn,sn->sp", slopes, slopes, majorised)
        scale = scale + 1e-12 * scale.amax(dim=1, keepdim=True) + 1e-300
        parts = (gradient, hessian, scale)
        first, second, third = (torch.nan_to_num(part).numpy() for part in parts)
        return first, second, third

    def select(self, keep: Bool[np.ndarray, " start"]) -> FormDescent:
        """The same objective for some of the starts."""
        kept = torch.from_numpy(keep)
        weights = self.weights if len(self.weights) == 1 else self.weights[kept]
        losses = self.log_loss if self.log_loss.ndim == 1 else self.log_loss[kept]
        return FormDescent(self.form, self.logs, losses, weights, self.overestimate)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormLaw(Settings):
    """A form as an estimator: least Huber loss in log residuals, over all checkpoints.

    `fit` leaves this value unchanged and returns a `FormFit`, which predicts and scores.
    """

    form: Form
    delta: float = 1e-3
    """Huber threshold in log loss."""
    embeddings: Embeddings = Embeddings.BOTH
    starts: int = 24
    """Descents to follow."""
    overestimate: float = 1.0
    """Factor on the rows that the law overestimates; see `ParametricLaw`."""

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Columns that the form reads."""
        return self.form.variables

    @property
    def unknowns(self) -> int:
        """Parameters that are fitted."""
        return len(self.form.names)

    def inputs(self, table: RunTable) -> dict[Variable, Float[np.ndarray, " row"]]:
        """The variables of each row."""
        return {name: variable_of(table, name, self.embeddings) for name in self.variables}

    def references(self, table: RunTable) -> tuple[float, ...]:
        """Log of the reference of each variable: the geometric mean of the first one of its unit."""
        inputs = self.inputs(table)
        by_unit: dict[str, float] = {ABSOLUTE: 0.0}
        for name in self.variables:
            by_unit.setdefault(UNITS[name], float(np.log(inputs[name]).mean()))
        return tuple(by_unit[UNITS[name]] for name in self.variables)

    def problem(self, table: RunTable) -> FormProblem:
        """The minimisation that fitting this law to `table` is.

        Raises:
            ValueError: Too few rows, or a variable that does not vary.
        """
        return self._problem(table, self.references(table))

    def _problem(self, table: RunTable, references: tuple[float, ...]) -> FormProblem:
        inputs = self.inputs(table)
        if len(table) < self.unknowns:
            raise ValueError(
                f"{table.source} has {len(table)} rows, and a law in {self.variables} has {self.unknowns} "
                "parameters; add runs, or choose a law with fewer"
            )
        for name, values in inputs.items():
            if len(np.unique(np.log(values).round(9))) < 2:
                raise ValueError(
                    f"{name} is {values[0]:g} in all {len(table)} rows of {table.source}: what it does "
                    "cannot be told; add runs that vary it, or choose a law that does not read it"
                )
        return FormProblem(
            form=self.form,
            logs={
                name: _tensor(np.log(inputs[name]) - reference)
                for name, reference in zip(self.variables, references, strict=True)
            },
            log_loss=np.log(table.column("loss_nats")),
            delta=self.delta,
            overestimate=self.overestimate,
        )

    def fit(self, table: RunTable) -> FormFit:
        """The global minimum, with a certificate.

        Warns:
            LawWarning: As `ParametricLaw.fit` does.
        """
        optimum = minimise.minimise(self.problem(table), starts=self.starts, names=self.form.names)
        fit = FormFit(
            law=self,
            table=table,
            estimate=self._estimate(optimum.parameters, self.references(table)),
            objective=optimum.objective,
            certificate=optimum.certificate,
        )
        for weakness in weaknesses(fit):
            warnings.warn(weakness, LawWarning, stacklevel=2)
        return fit

    def _estimate(
        self, vector: Float[np.ndarray, " parameter"], references: tuple[float, ...]
    ) -> FormEstimate:
        return FormEstimate(form=self.form, values=tuple(map(float, vector)), references=references)

    def refits(
        self,
        fit: FormFit,
        table: RunTable,
        weights: Float[np.ndarray, "draw row"],
        log_losses: Float[np.ndarray, "draw row"] | None = None,
    ) -> tuple[FormEstimate, ...]:
        """The law refitted once per row of weights, and of losses, from the optimum of `fit`."""
        references = fit.estimate.references
        vectors = minimise.refit(
            self._problem(table, references),
            np.asarray(fit.estimate.values),
            weights,
            log_losses=log_losses,
        )
        return tuple(self._estimate(vector, references) for vector in vectors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormFit:
    """A fitted form."""

    law: FormLaw
    table: RunTable
    estimate: FormEstimate
    objective: float
    """Sum over rows of Huber's function of the log residual."""
    certificate: minimise.Certificate

    def predict(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """Loss in nats per token for each row."""
        return self.estimate.loss(self.law.inputs(table))

    def score(self, table: RunTable) -> float:
        """Share of the variance of log loss that the law explains (R²)."""
        log_loss = np.log(table.column("loss_nats"))
        residual = log_loss - np.log(self.predict(table))
        return 1 - float(np.square(residual).sum() / np.square(log_loss - log_loss.mean()).sum())
