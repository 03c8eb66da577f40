"""Put a transformers model on the grid, and take it off again.

    mesh = Mesh(depth=2, row=2)
    parallel = parallelize(model, mesh)
    loss = parallel.model(input_ids=..., labels=...).loss

Modules with parameters are replaced in place, under their names; everything else of the model runs
as transformers wrote it. Each rank feeds its share of the batch, equal along row and col.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold_parallel.common.files import StrPath
from fourfold_parallel.common.held import Held
from fourfold_parallel.grid import layers
from fourfold_parallel.grid import whole as whole_blocks
from fourfold_parallel.grid.check import Check, LossForm, loss_form
from fourfold_parallel.grid.collectives import (
    ALONE,
    Axis,
    finish_under_way,
    refuse_under_way,
)
from fourfold_parallel.grid.flow import Flow, find_flows
from fourfold_parallel.grid.gradients import DataReducer, clip_gradients
from fourfold_parallel.grid.layout import (
    WIDE_BETWEEN,
    Alike,
    Divided,
    Expanding,
    Experts,
    Head,
    HeadsNorm,
    Latent,
    LowRankInput,
    LowRankOutput,
    Mixing,
    NormKind,
    OfHeads,
    PerHead,
    Plain,
    Positions,
    ResidualNorm,
    Rule,
    Stored,
    Swapped,
    Vocabulary,
    Whole,
    adapted,
    check_sizes,
    decoder_name,
    layer_of,
    norm_kind,
    refuse_quantised,
    rules_for,
    shares_heads,
    stored,
    text_config,
    widened,
)
from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.mesh import Cut, Mesh
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import ALL_OVERLAPS, Layer, Overlaps, Schedule
from fourfold_parallel.grid.sequence import Stretch, cut_tokens, find_stretch

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size")
"""Attributes by which attention modules of transformers count what a rank now holds a part of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """A model on the grid."""

    model: PreTrainedModel
    mesh: Mesh
    schedule: Schedule
    reducer: DataReducer
    stored: dict[str, Stored]
    """How each parameter is kept, by the name that it also has in the published model."""
    whole: dict[str, str]
    """The blocks in which every rank of row and col computes alike what takes time, and why: they cost
    `row * col` times that. Those of which only a router is computed alike are not among them."""
    cuts_tokens: bool
    """Whether a rank of row sees a part of the residual stream's tokens between blocks."""

    def settle(self, *, when: str) -> None:
        """Drop what was gathered ahead, and check that nothing else is under way.

        After a step, before parameters are saved, loaded or changed: a gather reads their memory.

        Args:
            when: For the message.

        Raises:
            RuntimeError: A collective was started and not waited for; it is named.
        """
        self.schedule.drop()
        refuse_under_way(when=when)

    def abandon(self) -> None:
        """Let everything end that is under way, for nobody to use: after an exception."""
        finish_under_way()
        self.schedule.drop()

    def clip(self, max_norm: float, *, order: float = 2.0) -> Float[Tensor, ""]:
        """Scale all gradients down to a norm of `max_norm`; gives the norm before."""
        self.settle(when="before gradients are clipped")
        return clip_gradients([*self.model.parameters()], self.mesh, max_norm=max_norm, order=order)

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole and as published, one at a time; every rank takes part.

        A tied parameter comes once, under its first name.
        """
        self.settle(when="before parameters are published")
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach()
            assert isinstance(whole, DTensor)
            yield name, self.stored[name].publish(whole.full_tensor())

    def held(self, name: str, owner: DTensor, piece: Tensor) -> Held:
        """This rank's share of something that is kept as a parameter is, in the published shape.

        Args:
            name: Of the parameter.
            owner: Says how it is cut: the parameter, or the optimizer's share of it.
            piece: This rank's memory.
        """
        how, kept = self.stored[name], tuple(owner.shape)
        shape = tuple(reversed(kept)) if how.transposed else kept
        slices = self.mesh.slices(kept, self.mesh.cut_of(owner))
        return Held.of(shape, piece.dtype, how.rectangles(piece, slices, kept))

    def save(self, folder: StrPath) -> None:
        """Write what plain `from_pretrained` reads; every rank calls it, the first one writes.

        Low-rank adapters go into peft's own files beside the model: those named `default` into the
        folder, others into a folder of their name. Peak memory of the first rank is the whole
        model, on the CPU.
        """
        folder = Path(folder)
        is_writer = dist.get_rank() == 0
        whole: dict[str, Tensor] = {}
        for name, tensor in self.published():
            if is_writer:
                whole[name] = tensor.cpu().clone()
        try:
            if is_writer:
                self._write(folder, whole)
        finally:  # nobody waits for ever for a writer that failed
            dist.barrier()

    def _write(self, folder: Path, whole: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        for adapter, config in configs.items():
            beside = folder if adapter == "default" else folder / adapter
            config.save_pretrained(str(beside))
            factor = re.compile(rf"(\.lora_[AB])\.{re.escape(adapter)}\.")
            factors = {
                "base_model.model." + factor.sub(r"\1.", name): whole.pop(name)
                for name in [*whole]
                if factor.search(name)
            }
            save_file(factors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        plain = {name.replace(".base_layer.", "."): tensor for name, tensor in whole.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.model.config)
        config.dtype = next(iter(whole.values())).dtype
        config.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)

    @torch.no_grad()
    def load(self, weights: StrPath) -> None:
        """Read published safetensors into this rank's pieces, in place."""
        self.settle(when="before parameters are loaded")
        with open_weights(weights) as source:
            for name, parameter in self.model.named_parameters():
                assert isinstance(parameter, DTensor)
                cut = self.mesh.cut_of(parameter)
                piece = self.stored[name].read(
                    source(name),
                    self.mesh.slices(parameter.shape, cut),
                    tuple(parameter.shape),
                )
                parameter._local_tensor.copy_(piece)  # noqa: SLF001 - in place, outside of autograd


def parallelize(
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    rules: Mapping[str, Rule] | None = None,
    overlaps: Overlaps = ALL_OVERLAPS,
    logits: Literal["whole", "split"] = "whole",
    keeps_tiles: bool = False,
    cuts_tokens: bool = False,
    products: Products | None = None,
    weights: StrPath | None = None,
    whole: Literal["allow", "refuse"] = "allow",
    experts: Literal["gathered", "exchanged"] = "gathered",
    checks: bool = True,
    empty: bool = False,
) -> Parallel:
    """Put a model on the grid; it is changed in place.

    Args:
        model: A causal language model of transformers, equal on every rank or on the meta device.
        mesh: The grid.
        rules: What modules become, by name pattern, where the published plan is not to be followed.
        overlaps: Which communication runs under computation.
        logits: `whole` gathers them over row; `split` leaves each rank its part of the vocabulary.
            The model's own loss is computed from either without gathering anything.
        keeps_tiles: Keep gathered tiles from forward to backward instead of gathering them again.
        cuts_tokens: The sequence form: between blocks, cut the residual stream's tokens over row.
        products: How matrix products are computed.
        weights: A safetensors file or a folder of them, from which to read instead of `model`.
        whole: Whether blocks that no rule covers may be computed alike on every rank of row and col
            (`Parallel.whole` names them), or are refused.
        experts: Over depth, gather experts where tokens are, as every weight, or leave each where it is
            stored and exchange tokens (expert parallelism).
        checks: Compare loss, logits and gradients of a few tokens before and after, where `model` has
            values: one forward and backward of the whole model.
        empty: Of a model on the meta device, give each rank memory for its pieces and no values: a
            checkpoint fills them.

    Raises:
        ValueError: A module cannot be cut, heads do not divide, or a model on the meta device came
            without weights: raised on every rank alike, before any collective. Or the check found the
            model on the grid to be another one.

    """
    refuse_quantised(model)
    form = loss_form(model)
    rules_of, flows = _rules_and_flows(model, mesh, rules or {}, whole)
    check_sizes(model, rules_of, {axis.name: axis.size for axis in mesh.axes})
    stretch = find_stretch(model, rules_of) if cuts_tokens else None
    norms = {
        name: norm_kind(name, model.get_submodule(name))
        for name, rule in rules_of.items()
        if isinstance(rule, ResidualNorm | HeadsNorm)
    }
    if weights is None and not empty and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model is on the meta device and has no values; pass weights=PATH, a safetensors "
            "file or a folder of them"
        )
    builder = _Builder(
        model=model,
        mesh=mesh,
        schedule=Schedule(overlaps),
        products=products or Products(),
        keeps_tiles=keeps_tiles,
        logits=logits,
        experts=experts,
        stretch=stretch,
        flows=flows,
        made={},
        stored={},
    )
    check = Check.of(model, mesh) if checks and weights is None else None
    with open_weights(weights) if weights is not None else _held(model) as source:
        builder.source = source
        # Modules of other modules first: what holds them takes them over.
        # Tables of a whole decoder last of the rest: a head may be tied to one, and has its own cut.
        for name, rule in sorted(
            rules_of.items(),
            key=lambda item: (isinstance(item[1], OfHeads | Whole), isinstance(item[1], Alike)),
        ):
            module = model.get_submodule(name)
            model.set_submodule(name, builder.layer(name, module, rule, norms.get(name)))
    _count_local_heads(model, rules_of, mesh.row)
    if stretch is not None:
        cut_tokens(model, stretch, mesh.row)
    _fill_buffers(model, mesh.torch_mesh.device_type)
    model.loss_function = GridLoss(mesh, text_config(model).vocab_size)
    _honour(model, form)
    schedule, reducer = builder.schedule, DataReducer(model.parameters(), mesh)
    parallel = Parallel(
        model=model, mesh=mesh, schedule=schedule, reducer=reducer, stored=builder.stored,
        whole={
            name: rule.reason
            for name, rule in rules_of.items()
            if isinstance(rule, Whole) and not rule.divided
        },
        cuts_tokens=stretch is not None and mesh.row.size > 1,
    )  # fmt: skip
    model.register_forward_pre_hook(
        lambda module, _, options: _restart(parallel, module, options), with_kwargs=True
    )
    model.register_load_state_dict_pre_hook(_keep_parameters)
    _tell_accelerate(model, reducer)
    if check is not None:
        check.compare(parallel.model, parallel.stored)
        schedule.drop()
    return parallel


def _rules_and_flows(
    model: PreTrainedModel,
    mesh: Mesh,
    overrides: Mapping[str, Rule],
    whole: Literal["allow", "refuse"],
) -> tuple[dict[str, Rule], dict[str, Flow]]:
    """The rules, and the flows of the blocks that are whole; these are widened until none leaks."""
    rules = rules_for(model, overrides, whole=whole)
    decoder = decoder_name(model)
    if text_config(model).model_type in WIDE_BETWEEN and mesh.col.size > 1:
        rules = widened(model, rules, {decoder: "its own code needs the whole residual stream"})
    while True:
        blocks = {name: rule.reason for name, rule in rules.items() if isinstance(rule, Whole)}
        if not blocks or mesh.row.size * mesh.col.size * mesh.depth.size == 1:
            return rules, {name: Flow() for name in blocks}
        watched = [name for name, rule in rules.items() if isinstance(rule, Whole | WITHIN)]
        try:
            flows = find_flows(model, watched, width=text_config(model).hidden_size)
        except ValueError:
            if mesh.col.size > 1:
                raise
            return rules, {name: Flow() for name in blocks}
        wider: dict[str, str] = {}
        for name in blocks:
            around = layer_of(model, name)
            if around != name and name.startswith(f"{decoder}."):
                if flows[name].is_read:
                    wider[around] = f"{name} is used without being called"
                elif flows[name].leaks:
                    wider[around] = f"the residual stream depends on another result of {name}"
        if wider:
            rules = widened(model, rules, blocks | wider)
            continue
        # What code around reads the weights of, instead of calling it, gets them with its block.
        uncalled = {
            name
            for name in watched
            if name not in blocks
            and not flows[name].is_known
            and any(name.startswith(f"{b}.") and flows[b].is_known for b in blocks)
        }
        return {name: rule for name, rule in rules.items() if name not in uncalled}, flows


WITHIN = Divided | Experts
"""What lies in whole blocks and is a layer of its own."""

Source = Callable[[str], Any]
"""From a parameter's name to something that gives its pieces when indexed with slices."""


@contextmanager
def open_weights(path: StrPath) -> Iterator[Source]:
    """The tensors of a safetensors file, or of all such files of a folder, read piece by piece.

    Raises:
        ValueError: There is no such file, or it lacks a parameter.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(
            f"{path} holds no safetensors; convert the weights, or name another folder"
        )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict

        def source(name: str) -> Any:
            if name not in where:
                raise ValueError(
                    f"{path} has no tensor {name!r}; it is from another model (it has "
                    f"{sorted(where)[0]!r})"
                )
            return where[name].get_slice(name)

        yield source


@contextmanager
def _held(model: nn.Module) -> Iterator[Source]:
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    yield parameters.__getitem__


@dataclass(slots=True, kw_only=True)
class _Builder:
    """Makes grid layers of a model's modules."""

    model: PreTrainedModel
    mesh: Mesh
    schedule: Schedule
    products: Products
    keeps_tiles: bool
    logits: Literal["whole", "split"]
    experts: Literal["gathered", "exchanged"]
    stretch: Stretch | None
    """Where tokens are cut over row, if they are."""
    flows: dict[str, Flow]
    """Of the whole blocks."""
    made: dict[int, tuple[nn.Parameter, Stored]]
    """Grid parameters by the identity of the published one, so that tied ones stay tied."""
    stored: dict[str, Stored]
    source: Source = dict[str, Any]().__getitem__

    def layer(self, name: str, module: nn.Module, rule: Rule, norm: NormKind | None) -> Layer:
        common: dict[str, Any] = {"mesh": self.mesh, "name": name, "schedule": self.schedule}
        take = lambda parameter, cut: self._take(name, module, rule, parameter, cut)  # noqa: E731
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        taken = lambda cut: {parameter: take(parameter, cut) for parameter in own}  # noqa: E731
        match rule:
            case Plain() | Latent() | Expanding() | Swapped() | Head():
                return self._linear(name, module, rule)
            case LowRankInput(swapped=swapped) | LowRankOutput(swapped=swapped):
                first = isinstance(rule, LowRankInput)
                cuts = layers.LOW_RANK_INPUT if first else layers.LOW_RANK_OUTPUT
                kind = layers.LowRankInput if first else layers.LowRankOutput
                return kind(
                    take("weight", cuts[swapped]), swapped=swapped,
                    cuts_tokens=self._cuts_tokens(name), **common,
                )  # fmt: skip
            case Vocabulary():
                padding = getattr(module, "padding_idx", None)
                scale = getattr(module, "scalar_embed_scale", 1.0)
                weight = take("weight", layers.VOCABULARY)
                return layers.Embedding(weight, padding_token=padding, scale=scale, **common)
            case Positions():
                return layers.Table(module, take("weight", layers.POSITIONS), **common)
            case PerHead():
                common["summed"] = [self.mesh.row, self.mesh.depth]
                return layers.Copied(module, taken(layers.COPIES), **common)
            case OfHeads(dim=dim):
                common["summed"] = [self.mesh.depth]
                return layers.Copied(module, taken({"row": dim}), **common)
            case Divided() | Experts() | Alike() | Whole():
                return self._block(name, module, rule)
            case Mixing():
                common["summed"] = [self.mesh.depth]
                width = text_config(self.model).hidden_size
                return layers.Mixing(module, taken(layers.COPIES), width=width, **common)
            case ResidualNorm() | HeadsNorm():
                assert norm is not None
                of_heads = isinstance(rule, HeadsNorm)
                cut = layers.HEADS if of_heads else layers.RESIDUAL
                weight = take("weight", cut)
                common["axis"] = self.mesh.row if of_heads else self.mesh.col
                common["summed"] = [self.mesh.depth]
                if self._cuts_tokens(name) and not of_heads:
                    common["summed"] = [self.mesh.row, self.mesh.depth]
                if norm.centred:
                    has_bias = getattr(module, "bias", None) is not None
                    bias = take("bias", cut) if has_bias else None
                    return layers.LayerNorm(weight, bias, epsilon=norm.epsilon, **common)
                return layers.RMSNorm(
                    weight, epsilon=norm.epsilon, offset=norm.offset, gains_wide=norm.gains_wide,
                    **common,
                )  # fmt: skip

    def _linear(
        self, name: str, module: nn.Module, rule: Plain | Latent | Expanding | Swapped | Head
    ) -> Linear:
        swapped = isinstance(rule, Swapped)
        weight = self._take(name, module, rule, "weight", weight_cut(swapped=swapped))
        bias = None
        if getattr(module, "bias", None) is not None:
            bias = self._take(name, module, rule, "bias", bias_cut(swapped=swapped))
        kind: type[Linear] = Linear
        config = text_config(self.model)
        kv_heads = getattr(config, "num_key_value_heads", None) or self.mesh.row.size
        if isinstance(rule, Plain) and rule.parts > 1:
            kind = layers.Interleaved
        elif shares_heads(name, kv_heads, self.mesh.row.size):
            kind = layers.SharedHeads
        elif isinstance(rule, Latent):
            kind = layers.Latent
        elif isinstance(rule, Expanding):
            kind = layers.Expanding
        elif isinstance(rule, Head) and self.logits == "whole":
            kind = layers.WholeHead
        layer = kind(
            weight, bias, mesh=self.mesh, name=name, schedule=self.schedule, swapped=swapped,
            keeps_tile=self.keeps_tiles, cuts_tokens=self._cuts_tokens(name),
            products=self.products,
        )  # fmt: skip
        if isinstance(layer, layers.Interleaved) and isinstance(rule, Plain):
            layer.parts = rule.parts
        if isinstance(layer, layers.SharedHeads):
            layer.heads = kv_heads
        return layer

    def _block(
        self, name: str, module: nn.Module, rule: Divided | Experts | Alike | Whole
    ) -> Layer:
        match rule:
            case Divided():
                return self._divided(name, module, rule)
            case Experts():
                return self._experts(name, module, rule)
            case Alike():
                return self._whole(name, module, rule, Flow(is_known=True))
            case Whole():
                return self._whole(name, module, rule, self.flows[name])

    def _divided(self, name: str, module: nn.Module, rule: Rule) -> Layer:
        weight = self._take(name, module, rule, "weight", whole_blocks.TILED)
        bias = None
        if getattr(module, "bias", None) is not None:
            bias = self._take(name, module, rule, "bias", whole_blocks.TILED)
        return whole_blocks.Divided(weight, bias, mesh=self.mesh, name=name, schedule=self.schedule)

    def _experts(self, name: str, module: nn.Module, rule: Experts) -> Layer:
        parameters = {
            own: self._take(
                name, module, rule, own,
                whole_blocks.experts_cut(rule.cuts[own]) if own in rule.cuts else layers.COPIES,
            )
            for own, _ in module.named_parameters(recurse=False)
        }  # fmt: skip
        packed = {own: rule.cuts[own] for own in rule.packed}
        kind = whole_blocks.Experts
        if self.experts == "exchanged" and self.mesh.depth.size > 1:
            kind = whole_blocks.ExchangedExperts
        return kind(
            module, parameters, packed=packed, once=rule.once, mesh=self.mesh, name=name,
            schedule=self.schedule,
        )  # fmt: skip

    def _whole(self, name: str, module: nn.Module, rule: Rule, flow: Flow) -> Layer:
        parameters: dict[str, nn.Parameter] = {}
        for full_name, parameter in module.named_parameters(remove_duplicate=False):
            if not isinstance(parameter, DTensor):  # of what is on the grid already, nothing
                path, _, own = full_name.rpartition(".")
                owner, cut = module.get_submodule(path), whole_blocks.TILED
                there = f"{name}.{path}" if path else name
                cut = cut if parameter.ndim else layers.COPIES
                taken = self._take(there, owner, rule, own, cut)
                if any(taken is other for other in parameters.values()):  # tied within the block
                    owner.register_parameter(own, taken)
                else:
                    parameters[full_name] = taken
        return whole_blocks.Whole(
            module, parameters, flow=flow, width=text_config(self.model).hidden_size,
            cuts_tokens=self._cuts_tokens(name), mesh=self.mesh, name=name, schedule=self.schedule,
        )  # fmt: skip

    def _cuts_tokens(self, name: str) -> bool:
        return self.stretch is not None and self.mesh.row.size > 1 and self.stretch.covers(name)

    def _take(
        self, name: str, module: nn.Module, rule: Rule, parameter_name: str, cut: Cut
    ) -> nn.Parameter:
        """The grid's parameter for a published one: read once, cut, and shared if it is tied."""
        full_name = f"{name}.{parameter_name}"
        published: nn.Parameter = getattr(module, parameter_name)
        if id(published) in self.made:
            parameter, self.stored[full_name] = self.made[id(published)]
            return parameter
        how = stored(module, rule, parameter_name)
        shape = how.keep_shape(published.shape)
        piece = how.read(self.source(full_name), self.mesh.slices(shape, cut), shape)
        device = self.mesh.torch_mesh.device_type
        if piece.is_meta:
            piece = torch.empty_like(piece, dtype=published.dtype, device=device)
        else:
            piece = piece.to(device, published.dtype, copy=True)
        parameter = nn.Parameter(
            self.mesh.assemble(piece, shape, cut), requires_grad=published.requires_grad
        )
        self.made[id(published)], self.stored[full_name] = (parameter, how), how
        return parameter


class GridLoss:
    """The mean cross-entropy of next tokens over all valid targets of the whole batch.

    Its value is that mean on every rank; its gradient is that of this rank's share, so that the sum
    of gradients over the batch's axes is the gradient of the mean, however unevenly valid targets
    are spread.
    """

    def __init__(self, mesh: Mesh, vocabulary: int) -> None:
        self.mesh, self.vocabulary = mesh, vocabulary

    def __call__(
        self,
        logits: Float[Tensor, "batch token vocabulary"],
        labels: Int[Tensor, "batch token"] | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = layers.IGNORED,
        shift_labels: Int[Tensor, "batch token"] | None = None,
        **_: Any,
    ) -> Float[Tensor, ""]:
        """With transformers' signature; `num_items_in_batch` replaces the count of valid targets."""
        del vocab_size
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.masked_fill(shift_labels == ignore_index, layers.IGNORED)
        nats = self.nats(logits, targets).sum()
        valid = (targets != layers.IGNORED).sum().to(nats.dtype)
        # One collective for both: each is a meeting of all ranks.
        nats_of_all, valid_of_all = self.mesh.sum_over_batch(torch.stack([nats.detach(), valid]))
        targets_of_all = valid_of_all if num_items_in_batch is None else num_items_in_batch
        share = nats / targets_of_all
        return share + (nats_of_all / targets_of_all - share.detach())

    def nats(
        self, logits: Float[Tensor, "*batch vocabulary"], targets: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Cross-entropy of each target; zero where it is ignored."""
        row = self.mesh.row
        start, stop = row.bounds(self.vocabulary)
        if logits.shape[-1] != stop - start:
            # Whole logits: their gradient is taken alike on every rank of row, as it should be.
            row = ALONE
        return layers.vocabulary_cross_entropy(logits, targets, row=row, vocabulary=self.vocabulary)


def _honour(model: PreTrainedModel, form: LossForm) -> None:
    """Give a model that computes its loss itself the grid's: its forward sees no labels."""
    if form == "function":
        return
    given: list[Tensor | None] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        given.append(kwargs.get("labels"))
        return args, {**kwargs, "labels": None}

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if (labels := given.pop()) is not None:
            said = {"labels": labels} if form == "shifted" else {"shift_labels": labels}
            output["loss"] = model.loss_function(
                output.logits, **{"labels": None, "vocab_size": output.logits.shape[-1], **said}
            )
        return output

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(add)


def _tell_accelerate(model: Any, reducer: DataReducer) -> None:
    """Leave the model as it is when `Accelerator.prepare` or `Trainer` gets it.

    The loss divides by the number of targets of the whole batch by itself, and its gradients are
    sums: nothing is to be wrapped, averaged or scaled.
    """
    model._is_accelerate_prepared = True  # noqa: SLF001 - accelerate's mark for what it must not wrap
    model.accepts_loss_kwargs = False
    model.no_sync = reducer.hold
    model.save_pretrained = _refuse_saving


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError("save_pretrained would write this rank's pieces; use Parallel.save(folder)")


def _count_local_heads(model: PreTrainedModel, rules: Mapping[str, Rule], row: Axis) -> None:
    """Tell attention modules how many heads they hold here."""
    parents = {
        adapted(name).rpartition(".")[0]
        for name, rule in rules.items()
        if isinstance(rule, Plain | Expanding)
    }
    for parent in parents:
        module: Any = model.get_submodule(parent)
        for attribute in HEAD_COUNTS:
            if isinstance(count := getattr(module, attribute, None), int):
                setattr(module, attribute, max(1, count // row.size))
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            config: Any = text_config(model)
            kv_heads = config.num_key_value_heads
            module.num_key_value_groups = (config.num_attention_heads // row.size) // max(
                1, kv_heads // row.size
            )


def _fill_buffers(model: PreTrainedModel, device: str) -> None:
    """Bring buffers to the device; those made on the meta device, such as rotary frequencies, anew."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if any(buffer.is_meta for buffer in buffers.values()):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)  # noqa: SLF001 - the method that model files override
        for name, buffer in buffers.items():
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)  # noqa: SLF001 - Module.to would also replace parameters


def _restart(parallel: Parallel, model: nn.Module, options: Mapping[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    routed = options.get("output_router_logits")
    if routed is None:
        routed = getattr(text_config(parallel.model), "output_router_logits", False)
    if routed and options.get("labels") is not None and parallel.mesh.batch_size() > 1:
        raise ValueError(
            "output_router_logits=True adds a loss that balances experts over a batch, and each of the "
            f"{parallel.mesh.batch_size()} shares of the batch would balance its own tokens, which is "
            "another loss; set it to False, or use data=1, depth=1"
        )
    if model is not parallel.model and parallel.mesh.data.size > 1 and torch.is_grad_enabled():
        raise RuntimeError(
            "a copy of a parallelized model does not sum its gradients over data; parallelize "
            "another model and read the weights with Parallel.load, or use the copy under no_grad"
        )
    parallel.schedule.restart()
    parallel.reducer.restart()


def _keep_parameters(*arguments: Any) -> None:
    """A hook before `load_state_dict`, whose option `assign` puts parameters in place of ours."""
    metadata = arguments[3]
    if metadata.get("assign_to_params_buffers"):
        raise ValueError(
            "load_state_dict(assign=True) would replace the parameters on the grid by some whose "
            "gradients are not summed; use assign=False, or Parallel.load(folder)"
        )
