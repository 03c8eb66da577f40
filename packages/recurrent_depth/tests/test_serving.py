"""Servers with caches of their own: the contract of vLLM's Transformers backend, and `generate_batch`.

vLLM itself is not run here. `Backend` does to the model what `vllm/model_executor/models/transformers` does
(read at 03bf3c92, 0848e674 and 055e47c2 of August and September 2026): it builds a base model, finds the
attentions, makes an instance with a cache for each layer that the configuration counts, and calls.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourfold_recurrent_depth import (
    RecurrentDepthConfig,
    RecurrentDepthDecoder,
    RecurrentDepthForCausalLM,
    load_published,
)
from fourfold_recurrent_depth.model import AttentionCall


def greedy(model: Any, tokens: Tensor) -> list[list[int]]:
    made = model.generate(
        tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[:, tokens.shape[1] :].tolist()


class Instance:
    """One layer's attention of the server: its cache, and causal attention of what is new to all."""

    def __init__(self, heads: int, width: int) -> None:
        self.heads, self.width = heads, width
        self.scale = 0.0
        self.keys = self.values = torch.zeros(0)
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All flat: (token, heads * width)."""
        self.calls += 1
        q, k, v = (x.view(len(x), -1, self.width).transpose(0, 1) for x in (query, key, value))
        self.keys = torch.cat([self.keys, k], 1) if self.keys.numel() else k
        self.values = torch.cat([self.values, v], 1) if self.values.numel() else v
        groups, seen = self.heads // len(k), self.keys.shape[1]
        mask = torch.ones(q.shape[1], seen, dtype=torch.bool).tril(seen - q.shape[1])
        out = F.scaled_dot_product_attention(
            q, self.keys.repeat_interleave(groups, 0), self.values.repeat_interleave(groups, 0),
            attn_mask=mask, scale=self.scale,
        )  # fmt: skip
        return out.transpose(0, 1).flatten(1)


def attention_of_the_server(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, attention_instances: Any = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """By `layer_idx`, with flat heads, as vLLM's function of the name "vllm"."""
    assert attention_mask is None
    instance = attention_instances[module.layer_idx]
    assert scaling is not None
    instance.scale = float(scaling)
    flat = (x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value))
    return instance(*flat), None


class Backend:
    """A request at a server that knows a model by `AutoModel` and its configuration alone."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = AutoConfig.from_pretrained(folder)
        self.config._attn_implementation = "vllm"
        self.model: Any = AutoModel.from_config(self.config).eval()
        heads, width = self.config.num_attention_heads, self.config.head_dim
        layers = range(self.config.num_hidden_layers)
        self.instances = {layer: Instance(heads, width) for layer in layers}
        self.head = nn.Linear(self.config.hidden_size, 1, bias=False)
        self.load(load_file(folder / "model.safetensors"))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Names as vLLM's mapper makes them: children of the model behind `model.`, the head beside it."""
        children = [name for name, _ in self.model.named_children()]
        children += [name for name, _ in self.model.named_buffers(recurse=False)]
        tied = self.model.get_input_embeddings().weight
        own = {}
        for name, weight in weights.items():
            bare = name.removeprefix("model.")
            if bare.split(".")[0] in children:
                own[bare] = weight
            else:
                assert bare == "lm_head.weight"
                tied = weight
        self.model.load_state_dict({**self.model.state_dict(), **own})
        assert {*own} == {*self.model.state_dict()}
        if self.config.tie_word_embeddings:
            tied = self.model.get_input_embeddings().weight
        self.head.weight = nn.Parameter(tied)

    def greedy(self, prompt: Tensor, count: int) -> list[int]:
        """Tokens behind one prompt: the prompt at once, then one by one; ids and positions in 32 bits."""
        ids, place, made = prompt[None], 0, []
        for _ in range(count):
            positions = torch.arange(place, place + ids.shape[1], dtype=torch.int32)[None]
            with torch.no_grad():
                states = self.model(
                    input_ids=ids.int(), inputs_embeds=None, use_cache=False, position_ids=positions,
                    attention_instances=self.instances, return_dict=False,
                )[0][0]  # fmt: skip
                made.append(int(self.head(states[-1]).argmax()))
            place += ids.shape[1]
            ids = torch.tensor([[made[-1]]])
        return made


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register("vllm", attention_of_the_server)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping["vllm"]


@pytest.fixture(params=["huginn_raven", "ouro", "nanbeige", "parcae"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: RecurrentDepthForCausalLM, publish: Any
) -> tuple[RecurrentDepthForCausalLM, Path, Tensor]:
    """A model, its folder, and rows of tokens."""
    folder, name = tmp_path / "saved", request.param
    # Without 0, from which `generate` would infer padding.
    tokens = torch.randint(1, 29, (2, 7), generator=torch.Generator().manual_seed(2))
    model = tiny if name == "huginn_raven" else load_published(publish(name, tmp_path))
    model.save_pretrained(folder)
    return model, folder, tokens


def test_the_backend_serves_what_generate_gives(served: Any) -> None:
    """One instance for each (loop, layer), each called once a pass; tokens of `generate` by itself."""
    model, folder, tokens = served
    for row in tokens:
        backend = Backend(folder)
        assert isinstance(backend.model, RecurrentDepthDecoder)
        assert backend.greedy(row, 6) == greedy(model, row[None])[0]
        config = backend.config
        around = config.n_layers_in_prelude + config.n_layers_in_coda
        slots = around + config.n_layers_in_recurrent_block * config.mean_recurrence
        assert len(backend.instances) == slots
        assert {instance.calls for instance in backend.instances.values()} == {6}
        lengths = {instance.keys.shape[1] for instance in backend.instances.values()}
        assert lengths == {len(row) + 5}


def test_the_contract_of_the_backend(served: Any) -> None:
    """The attributes that vLLM reads, each with what it reads them for."""
    model, folder, _ = served
    backend = Backend(folder)
    inner, config = backend.model, backend.config
    # Whether the backend takes the class at all; and that nothing of it attends to what comes later.
    assert type(inner)._supports_attention_backend
    assert all(getattr(module, "is_causal", True) for module in inner.modules())
    # The model may be told of its configuration, and its configuration by it: they are one object.
    assert inner.config is config
    assert config.get_text_config() is config
    assert inner.get_decoder() is inner
    for name in (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert isinstance(getattr(config, name), int)
    # The embedding can be replaced, and there is no head: the server has its own.
    table = nn.Embedding(config.padded_vocab_size, config.hidden_size)
    inner.set_input_embeddings(table)
    assert inner.get_input_embeddings() is table
    assert not [name for name, _ in inner.named_parameters() if "lm_head" in name]
    # A parameter is a module's own, not two modules' (`init_parameters` makes them anew on a device).
    assert len({*map(id, inner.parameters())}) == len([*inner.parameters()])
    # Tensor-parallel styles name linear layers that exist.
    linear = {name for name, module in inner.named_modules() if isinstance(module, nn.Linear)}
    for pattern in inner.tp_plan or {}:
        assert any(name.startswith("layers.0.") for name in linear)
        assert pattern.replace("*", "0") in linear
    assert bool(inner.tp_plan) == (model.config.form.root == "model")
    # What is saved says the layers that have weights.
    assert "serves_slots" not in copy.deepcopy(config).to_dict()


def test_attentions_are_where_vllm_looks_for_them(served: Any) -> None:
    """It parses `forward` for one lookup in `ALL_ATTENTION_FUNCTIONS` and one call, and reads `layer_idx`."""
    _, folder, _ = served
    backend = Backend(folder)
    dispatching: dict[str, int] = {}
    for name, module in backend.model.named_modules():
        calls = interface_calls(type(module))
        if len(calls) == 1:
            (call,) = calls
            scaling = [word.value for word in call.keywords if word.arg == "scaling"]
            assert ast.unparse(scaling[0]) == "self.scaling"
            assert isinstance(module.scaling, float)  # type: ignore[arg-type]
            dispatching[name] = module.layer_idx  # type: ignore[assignment]
    assert sorted(dispatching.values()) == sorted(backend.instances)
    assert {type(backend.model.get_submodule(name)) for name in dispatching} == {AttentionCall}
    assert not [*backend.model.get_submodule(next(iter(dispatching))).parameters()]


def interface_calls(kind: type[nn.Module]) -> list[ast.Call]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return []
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_lookup(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def is_lookup(node: ast.expr | None) -> bool:
    node = node.func if isinstance(node, ast.Call) else node
    is_part = isinstance(node, ast.Attribute | ast.Subscript)
    return is_part and ast.unparse(node.value) == "ALL_ATTENTION_FUNCTIONS"  # type: ignore[union-attr]


def test_linear_layers_may_be_replaced(served: Any) -> None:
    """vLLM puts its own in their place, the adapter among them, which then multiplies both halves at once."""
    _, folder, tokens = served
    expected = Backend(folder).greedy(tokens[0], 4)
    backend = Backend(folder)
    for name, module in [*backend.model.named_modules()]:
        if isinstance(module, nn.Linear):
            replaced = Replicated(module.weight, module.bias)
            backend.model.set_submodule(name, replaced)
    assert backend.greedy(tokens[0], 4) == expected


class Replicated(nn.Module):
    """A linear layer by another class."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_what_a_served_pass_cannot_do_is_refused(tiny: RecurrentDepthForCausalLM) -> None:
    decoder: Any = RecurrentDepthDecoder(tiny.config).eval()
    tokens, places = torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None]
    with pytest.raises(ValueError, match="use_cache=True asks a decoder"):
        decoder(tokens, position_ids=places, use_cache=True)
    with pytest.raises(ValueError, match="a served pass needs position_ids"):
        decoder(tokens)
    with pytest.raises(ValueError, match="a served pass needs position_ids, evaluation"):
        decoder.train()(tokens, position_ids=places)


def test_continuous_batching_gives_what_generate_gives(served: Any) -> None:
    """Requests of several lengths in one row of tokens, on pages: each as by itself, greedily."""
    model, _, tokens = served
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist(), tokens[1].tolist()]
    alone = [greedy(model, torch.tensor([prompt]))[0] for prompt in prompts]
    model.generation_config.eos_token_id = -1
    stages = stages_of(model)
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=32)
    answers = model.generate_batch(prompts, max_new_tokens=6, continuous_batching_config=pages)
    made = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert [made[tuple(prompt)] for prompt in prompts] == alone
    # The same model goes on as before, compiled blocks included.
    assert stages_of(model) == stages
    assert [greedy(model, torch.tensor([prompt]))[0] for prompt in prompts] == alone


def stages_of(model: RecurrentDepthForCausalLM) -> list[type]:
    with torch.no_grad():
        return [
            type(stage) for stage in model.begin(torch.ones(1, 1).long(), None)[1].stages.values()
        ]


def test_continuous_batching_needs_masks(make: Any) -> None:
    model = make(reference_semantics=True)
    with pytest.raises(ValueError, match="requests share a row"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_slots_are_counted_where_a_server_counts_them(tiny: RecurrentDepthForCausalLM) -> None:
    """And nowhere else: a configuration says the layers that have weights until a model serves."""
    config = RecurrentDepthConfig(
        **{k: v for k, v in tiny.config.to_dict().items() if k != "dtype"}
    )
    assert config.num_hidden_layers == 4
    decoder = RecurrentDepthDecoder(config)
    assert config.num_hidden_layers == 2 + 2 * config.mean_recurrence
    again = RecurrentDepthConfig.from_dict(config.to_dict())
    assert again.num_hidden_layers == 4
    assert len([m for m in decoder.modules() if isinstance(m, AttentionCall)]) == 14
