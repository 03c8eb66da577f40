"""Engines: how a model and its optimizer are laid over devices. The seam that the loop is written against.

An `Engine` is a frozen value of a recipe. `open` gives a `Session`, which owns the prepared model and
optimizer and answers five questions of the loop: which rows are mine (`rank`, `ranks`), a scope for one
microbatch, how to backpropagate my share of a globally normalised loss, how to sum over the ranks that
hold other rows, and how to clip and step. The four-dimensional engine stands behind the same seam.
"""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from fourfold_parallel.common.held import (
    Held,
    Saved,
    State,
    number,
    parts_of_stretch,
    single,
    take_group,
    ties_of,
    weights_of,
)
from fourfold_parallel.launch import check_launched, device, process_group, world_size
from fourfold_parallel.run.state import restoring, state_of


class Session(Protocol):
    """A prepared model and optimizer on their devices."""

    rank: int
    """Number of the share of every batch that this process holds, from 0."""
    ranks: int
    """In how many shares a batch is cut."""
    is_main: bool
    """True on the process that writes records and files."""
    device: torch.device
    model: nn.Module
    """The model to call; called with keyword arguments as the plain one is."""
    optimizer: torch.optim.Optimizer
    """Holds the learning rates (`param_groups`); stepped through `update` only."""
    sees_waits: bool
    """Whether it notes (`common.activity`) when it waits for other ranks in forward and backward."""

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """The scope of one forward and backward; gradients may stay unreduced until the last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's share of the loss.

        After the last microbatch every gradient is that of the sum of all shares, over ranks and
        microbatches.
        """
        ...

    def update(self, max_grad_norm: float) -> float:
        """Clip to a global 2-norm, step, clear gradients; gives the norm before clipping.

        Where the norm is not finite, the model may be ruined: the loop stops without saving it.
        """
        ...

    def sum(self, value: Tensor) -> Tensor:
        """A tensor of this rank summed over all shares of the batch; the same on every rank."""
        ...

    def state(self) -> State:
        """This rank's share of weights and optimizer, under the plain model's names.

        Views of the memory in use: nothing is copied, and no rank waits for another.
        """
        ...

    def restoring(self, saved: Saved) -> AbstractContextManager[State]:
        """Room for what a checkpoint holds, whatever layout wrote it.

        The tensors of the state are filled within the scope; what hangs on them is set at its end. Every
        rank enters it.
        """
        ...

    def wait(self) -> None:
        """Return when every rank has called this."""
        ...


class Engine(Protocol):
    """A way of laying a run over the ranks that exist."""

    takes_outlines: ClassVar[bool]
    """Whether a model on the meta device may be opened, for a checkpoint to fill."""

    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> AbstractContextManager[Session]:
        """Prepare model and optimizer for the length of a run.

        Args:
            model: on the CPU, the same weights on every rank.
            optimizer: over the model's parameters, with no state yet.
            precision: compute type.
            batch: rows of a step over all ranks.
            microbatch: rows of one forward pass on one rank.

        Raises:
            ValueError: on every rank alike, where the run does not fit the ranks.
        """
        ...


def check_share(engine: str, batch: int, ranks: int) -> None:
    """Refuse a batch that does not divide over the ranks.

    Raises:
        ValueError: It does not; batch, ranks and the way out are named.
    """
    if batch % ranks:
        raise ValueError(
            f"batch={batch} does not divide over {ranks} ranks of engine {engine}; "
            f"use a multiple of {ranks}, or launch another number of processes"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One process, one device, plain torch."""

    takes_outlines: ClassVar[bool] = False

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,  # noqa: ARG002 - the protocol's
        microbatch: int,  # noqa: ARG002
    ) -> Iterator[Session]:
        """A session without any collective."""
        if world_size() > 1:
            raise ValueError(
                f"engine Single runs in one process, but {world_size()} were launched; "
                "use DDP, FSDP2 or DeepSpeed, or launch one"
            )
        on = device()
        yield PlainSession(model.to(on), optimizer, on, precision)


class PlainSession:
    """Plain torch on one device; the base of what accelerate does with several."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.rank: int = 0
        self.ranks: int = 1
        self.is_main: bool = True
        self.device: torch.device = device
        self.model: nn.Module = model
        self.optimizer: torch.optim.Optimizer = optimizer
        self.sees_waits: bool = True
        self._precision = precision

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:  # noqa: ARG002 - the protocol's
        """Autocast, where the precision is bf16."""
        casts = self._precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if casts else nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add this loss' gradients to those that are there."""
        loss.backward()

    def update(self, max_grad_norm: float) -> float:
        """Clip, step, clear."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def sum(self, value: Tensor) -> Tensor:
        """The value itself: nobody holds other rows."""
        return value

    def state(self) -> State:
        """All of the state."""
        return state_of(self.model, self.optimizer)

    def restoring(self, saved: Saved) -> AbstractContextManager[State]:
        """Room for all of the state."""
        return restoring(self.model, self.optimizer, saved)

    def wait(self) -> None:
        """Nobody is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DDP:
    """A replica per rank; gradients averaged in buckets while backward runs (torch DDP, accelerate)."""

    takes_outlines: ClassVar[bool] = False

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,  # noqa: ARG002 - the protocol's
    ) -> Iterator[Session]:
        """A session over all launched ranks; gloo on CPUs, NCCL on GPUs."""
        check_launched("DDP")
        check_share("DDP", batch, world_size())
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        with _accelerator(precision, kwargs_handlers=[buckets]) as accelerator:
            yield _AccelerateSession(accelerator, model, optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDP2:
    """Parameters, gradients and optimizer state sharded over all ranks (torch fully_shard, accelerate)."""

    takes_outlines: ClassVar[bool] = False
    reshard_after_forward: bool
    """Free gathered weights after the forward pass: less memory, one more gather."""

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,  # noqa: ARG002 - the protocol's
    ) -> Iterator[Session]:
        """A session over all launched ranks; each decoder layer is one unit."""
        check_launched("FSDP2")
        check_share("FSDP2", batch, world_size())
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=self.reshard_after_forward,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        with _accelerator(precision, fsdp_plugin=plugin) as accelerator:
            yield _AccelerateSession(accelerator, model, optimizer)


STALE_LOCK_S = 600
"""DeepSpeed's extensions compile in a minute or two: an older lock is nobody's."""


def check_no_stale_lock() -> None:
    """A DeepSpeed that was killed while it compiled leaves a lock, for which every later one waits for ever.

    Raises:
        ValueError: There is such a lock.
    """
    from torch.utils.cpp_extension import get_default_build_root  # only DeepSpeed needs it

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    # In torch's own place every interpreter has a folder; the locks of others stop nobody here.
    mine = "" if named else f"py{sys.version_info.major}{sys.version_info.minor}*/"
    for lock in Path(named or get_default_build_root()).glob(f"{mine}deepspeed_*/lock"):
        age_s = time.time() - lock.stat().st_mtime
        if age_s > STALE_LOCK_S:
            raise ValueError(
                f"{lock} is {age_s / 60:.0f} minutes old: a DeepSpeed that compiled was killed, and this "
                f"one would wait for it without end; remove the file if nothing is compiling"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeed:
    """DeepSpeed ZeRO through accelerate: 1 shards optimizer state, 2 gradients too, 3 parameters too."""

    takes_outlines: ClassVar[bool] = False
    zero: Literal[1, 2, 3]

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> Iterator[Session]:
        """A session over all launched ranks. Needs `fourfold-parallel[deepspeed]`.

        Raises:
            ValueError: The batch does not divide, or a lock from a killed compilation is there.
        """
        check_launched("DeepSpeed")
        check_no_stale_lock()
        ranks = world_size()
        check_share("DeepSpeed", batch, ranks)
        share = batch // ranks
        plugin = DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": min(microbatch, share),
                # Microbatches are weighted by the loop, so DeepSpeed must not divide by their number.
                "gradient_accumulation_steps": 1,
                "zero_optimization": {
                    "stage": self.zero,
                    # Without this no whole weights can be gathered for a checkpoint under stage 3; they
                    # are in the type that is trained in, whatever the name says.
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "bf16": {"enabled": precision == "bf16"},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**12,
            }
        )
        with _accelerator(precision, cpu=False, deepspeed_plugin=plugin) as accelerator:
            yield _DeepSpeedSession(accelerator, model, optimizer)


@contextmanager
def _accelerator(
    precision: Literal["fp32", "bf16"],
    *,
    cpu: bool | None = None,
    kwargs_handlers: Sequence[Any] = (),
    **plugins: Any,
) -> Iterator[Accelerator]:
    """An `Accelerator` whose singletons, variables and process group do not outlive the run."""
    variables = {name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))}
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - accelerate's own way
    # accelerate knows no backend for DeepSpeed without an accelerator card unless it is named.
    named = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    with process_group(device()):
        try:
            yield Accelerator(
                mixed_precision="bf16" if precision == "bf16" else "no",
                cpu=not torch.cuda.is_available() if cpu is None else cpu,
                kwargs_handlers=[*kwargs_handlers, named],
                **plugins,
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
            for name in list(os.environ):
                if name.startswith(("ACCELERATE_", "FSDP_")) and name not in variables:
                    del os.environ[name]


class _AccelerateSession:
    """DDP and FSDP2: both average gradients over ranks, so a share is scaled up by their number."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        # accelerate's state is a shared dictionary whose types no checker sees.
        self._accelerator: Any = accelerator
        self.rank: int = self._accelerator.process_index
        self.ranks: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        there, seen = dist.get_world_size(), self._accelerator.distributed_type
        if there > 1 and seen == DistributedType.NO:
            raise ValueError(
                f"the process group has {there} ranks, and accelerate takes this one to be alone, and would "
                "train each by itself: it reads LOCAL_RANK and WORLD_SIZE, which torchrun and others set"
            )
        self.device: torch.device = self._accelerator.device
        prepared: Any = self._accelerator.prepare(model, optimizer)
        self.model: nn.Module = prepared[0]
        self.optimizer: torch.optim.Optimizer = prepared[1]
        self.sees_waits: bool = False

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        unreduced = nullcontext() if is_last else self._accelerator.no_sync(self.model)
        with unreduced, self._accelerator.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss * self.ranks)

    def update(self, max_grad_norm: float) -> float:
        norm: Any = self._accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def sum(self, value: Tensor) -> Tensor:
        if self.ranks == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def state(self) -> State:
        return state_of(*self._bare())

    def restoring(self, saved: Saved) -> AbstractContextManager[State]:
        return restoring(*self._bare(), saved)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def _bare(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        wrapped: Any = self.optimizer
        return self._accelerator.unwrap_model(self.model), wrapped.optimizer


class _DeepSpeedSession(_AccelerateSession):
    """ZeRO: DeepSpeed's own engine clips and steps; its weights and moments lie in flat stretches.

    A checkpoint holds the float32 weights that the optimizer steps on, whatever type is computed in.
    """

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        engine: Any = self.model
        engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        with self._accelerator.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        engine: Any = self.model
        engine.backward(loss * self.ranks)

    def update(self, max_grad_norm: float) -> float:
        engine: Any = self.model
        engine.optimizer.clip_grad = 0.0 if max_grad_norm == float("inf") else max_grad_norm
        engine.step()
        norm = float(engine.get_global_grad_norm())
        # DeepSpeed says -1 where the norm is not finite.
        return math.nan if norm < 0 else norm

    def state(self) -> State:
        module, zero = self._module_and_zero()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        weights = {name: Held.whole(tensor) for name, tensor in weights_of(module)}
        moments: dict[str, Held] = {}
        singles: dict[str, Any] = {}
        groups = [{**group, "params": []} for group in zero.optimizer.param_groups]
        for name, parameter in module.named_parameters():
            frozen: Tensor | None = getattr(parameter, "ds_tensor", None)
            if frozen is not None:  # one that is not trained, under stage 3
                weights[name] = self._stretch(parameter, frozen)
        for flat, group, parameters in self._flats(zero):
            of_flat = zero.optimizer.state.get(flat, {})
            for parameter in parameters:
                name = names[id(parameter)]
                groups[group]["params"].append(name)
                weights[name] = self._fragment(zero, parameter, flat)
                for key, value in of_flat.items():
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        moments[f"{name}/{key}"] = self._fragment(zero, parameter, value)
                    else:
                        singles[f"{name}/{key}"] = single(value)
        return State(
            weights=weights, moments=moments, ties=ties_of(module),
            numbers={"groups": groups, "singles": singles},
        )  # fmt: skip

    @contextmanager
    def restoring(self, saved: Saved) -> Iterator[State]:
        module, zero = self._module_and_zero()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        zero.optimizer.state.clear()
        singles = saved.numbers["singles"]
        for flat, _, parameters in self._flats(zero):
            first = names[id(parameters[0])]
            for name, key, _, dtype in saved.moments():
                if name == first:
                    made = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
                    zero.optimizer.state[flat][key] = made
            for path, value in singles.items():
                name, _, key = path.rpartition("/")
                if name == first:
                    zero.optimizer.state[flat][key] = number(value, flat.device)
        yield self.state()
        for own, group in zip(zero.optimizer.param_groups, saved.numbers["groups"], strict=True):
            take_group(own, group)
        if hasattr(zero, "fp16_partitioned_groups_flat"):
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)  # noqa: SLF001 - no public name
        else:
            zero.update_lp_params()
            if hasattr(zero, "_hp_optimizer_states_linked"):
                zero._hp_optimizer_states_linked = False  # noqa: SLF001 - made anew at the next step

    def _module_and_zero(self) -> tuple[nn.Module, Any]:
        engine: Any = self.model
        return engine.module, engine.optimizer

    def _flats(self, zero: Any) -> Iterator[tuple[Tensor, int, list[Any]]]:
        """This rank's stretch of each group's weights in float32, the group, and its parameters."""
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield flat, zero.sub_group_to_group_id[index], zero.fp16_groups[index]
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            groups = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
            for index, (flat, parameters) in enumerate(groups):
                yield flat, index, parameters
        else:  # stage 1 in bfloat16
            groups = zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
            for index, (flat, parameters) in enumerate(groups):
                yield flat, index, parameters

    def _fragment(self, zero: Any, parameter: Any, flat: Tensor) -> Held:
        """The share of a parameter in a stretch that is laid out like its group's weights."""
        if hasattr(parameter, "ds_tensor"):
            _, start, count = zero.grad_position[zero.get_param_id(parameter)]
            return self._stretch(parameter, flat.detach().narrow(0, start, count))
        mapping = parameter._hp_mapping  # noqa: SLF001 - DeepSpeed's way
        if mapping is None:
            return Held.of(parameter.shape, flat.dtype, [])
        place = mapping.get_hp_fragment_address()
        values = flat.detach().narrow(0, place.start, place.numel)
        parts = parts_of_stretch(parameter.shape, mapping.lp_fragment_address.start, values)
        return Held.of(parameter.shape, flat.dtype, [*parts])

    def _stretch(self, parameter: Any, values: Tensor) -> Held:
        """This rank's stretch of a parameter under stage 3; the last may have padding behind it."""
        start = self.rank * values.numel()
        mine = values.detach()[: max(0, parameter.ds_numel - start)]
        parts = parts_of_stretch(parameter.ds_shape, start, mine)
        return Held.of(parameter.ds_shape, values.dtype, [*parts])
