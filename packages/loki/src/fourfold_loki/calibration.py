"""One pass over a text: moments of queries and keys of every layer, streamed; no activation is stored."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_loki.attention_mode import AttentionCall, Observe
from fourfold_loki.huggingface.session import attending
from fourfold_loki.huggingface.sites import (
    attention_modules,
    check_model,
    head_width,
    is_iterated,
)
from fourfold_loki.moments import CalibrationSource, Moments, Statistics, fingerprint
from fourfold_loki.selectors.hash_attention import HashAttention, Learner
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.run.tokenizers import beginning, encoded

ROUNDING = 0.05
"""Of the largest coordinate: bfloat16 turned forth and back loses less than that, other angles nearly all."""


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Iterable[str],
    *,
    tokens: int = 8192,
    context: int = 2048,
    progress: Progress = silent,
) -> Statistics:
    """Statistics of a model over texts that are tokenized and packed into windows.

    Args:
        model: a rotary causal language model of transformers.
        tokenizer: its tokenizer.
        texts: documents, taken in order until there are enough tokens; a string is one document.
        tokens: how many to use; 50 times the head width is enough (the paper gives no number).
        context: tokens a window. Rotary keys depend on positions: calibrate at the length of use.
        progress: told after each window.

    Raises:
        ValueError: where the texts are too short or the context too long.
    """
    return calibrate_tokens(
        model, windows(tokenizer, texts, tokens=tokens, context=context), progress=progress
    )


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: str | Iterable[str], *, tokens: int, context: int
) -> Int[Tensor, "window context"]:
    """Texts as ids, end to end, cut into windows; what does not fill a window is left out.

    Every window begins as the tokenizer begins every text.

    Raises:
        ValueError: where the texts hold fewer tokens.
    """
    start = beginning(tokenizer)
    room = context - len(start)
    needed = max(tokens // context, 1) * room
    ids: list[int] = []
    for text in [texts] if isinstance(texts, str) else texts:
        ids.extend(encoded(tokenizer, text))
        if len(ids) >= needed:
            cut = torch.tensor(ids[:needed]).view(-1, room)
            return torch.cat(
                [torch.tensor(start, dtype=cut.dtype).expand(len(cut), -1), cut], dim=1
            )
    raise ValueError(
        f"the texts hold {len(ids)} tokens and {needed} were asked for; give more text or fewer tokens"
    )


@torch.no_grad()
def calibrate_tokens(
    model: PreTrainedModel,
    ids: Int[Tensor, "window context"],
    *,
    progress: Progress = silent,
) -> Statistics:
    """`calibrate` for token ids, one window at a time.

    Raises:
        ValueError: for windows longer than the model's context, a model without rotary keys, or keys that
            its configuration does not describe.
    """
    check_model(model)
    config = model.config.get_text_config()
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens exceed the model's context of "
            f"{config.max_position_embeddings}; use shorter ones"
        )
    layers, kv_heads = layers_of(model), config.num_key_value_heads
    width = head_width(config)
    keys, queries, keys_before, queries_before = (
        Moments.empty(layers, kv_heads, width) for _ in range(4)
    )

    is_before_known = turns_back(model, ids[:1, :8])

    def take(seen: AttentionCall) -> None:
        if (seen.keys.shape[1], seen.keys.shape[3]) != (kv_heads, width):
            raise ValueError(
                f"{type(model).__name__} attends to {seen.keys.shape[1]} key/value heads of width "
                f"{seen.keys.shape[3]}, and its configuration states {kv_heads} of width {width}; use a "
                "model whose attention compares queries with the keys that its configuration describes"
            )
        queries_of = seen.queries.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        keys.add_(seen.layer, seen.keys)
        queries.add_(seen.layer, queries_of)
        if not is_before_known:
            return  # `Statistics.of` refuses that stage
        assert seen.positions is not None
        before = unrotated(seen.queries, seen.positions).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        keys_before.add_(seen.layer, unrotated(seen.keys, seen.positions))
        queries_before.add_(seen.layer, before)

    with attending(model, Observe(observer=take)):
        for done, row in enumerate(ids, start=1):
            model.base_model(row[None].to(model.device), use_cache=False)
            progress(done, len(ids), "calibrating")
    return Statistics(
        keys=keys,
        queries=queries,
        keys_before=keys_before,
        queries_before=queries_before,
        source=CalibrationSource(
            model=fingerprint(model),
            corpora=(hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest(),),
            tokens=ids.numel(),
        ),
    )


@torch.no_grad()
def learn_signatures(
    model: PreTrainedModel,
    ids: Int[Tensor, "window context"],
    *,
    bits: int = 32,
    hidden: tuple[int, ...] = (64,),
    steps: int = 20,
    progress: Progress = silent,
) -> HashAttention:
    """HashAttention's networks, learned on a model's queries and keys.

    Args:
        model: the model; its layers are not iterated.
        ids: windows of text.
        bits: of a signature.
        hidden: sizes of the networks between the head's width and the bits.
        steps: of Adam in each window and layer.
        progress: told of every window.
    """
    config = model.config.get_text_config()
    learner = Learner(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        sizes=(head_width(config), *hidden, bits),
        steps=steps,
    )

    def take(seen: AttentionCall) -> None:
        learner.learn(seen.layer, seen.queries[0], seen.keys[0], seen.visible[0, 0])

    with attending(model, Observe(observer=take)):
        for done, row in enumerate(ids, start=1):
            model.base_model(row[None].to(model.device), use_cache=False)
            progress(done, len(ids), "learning signatures")
    return learner.selector()


@torch.no_grad()
def layers_of(model: PreTrainedModel) -> int:
    """Attention layers; of a model that iterates them, the attention calls of a pass at its default depth."""
    if not is_iterated(model):
        return len(attention_modules(model))
    calls: list[int] = []
    with attending(model, Observe(observer=lambda seen: calls.append(seen.layer))):
        model.base_model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    return len(calls)


@torch.no_grad()
def turns_back(model: PreTrainedModel, ids: Int[Tensor, "one token"]) -> bool:
    """True where `unrotated` gives every layer's vectors as they were before the rotary embedding.

    Every attention module is called a second time with angles of zero, which turn nothing. Some models
    turn neighbouring coordinates instead of halves, some have layers that do not turn, and some do not
    tell their angles.
    """
    calls: list[AttentionCall] = []

    def again(module: nn.Module, arguments: Any, keywords: dict[str, Any], output: object) -> None:
        del output
        if isinstance(positions := keywords.get("position_embeddings"), tuple):
            still = (torch.ones_like(positions[0]), torch.zeros_like(positions[1]))
            module.forward(*arguments, **{**keywords, "position_embeddings": still})

    hooks = [
        module.register_forward_hook(again, with_kwargs=True) for module in attention_modules(model)
    ]
    try:
        with attending(model, Observe(observer=calls.append)):
            model.base_model(ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if any(call.positions is None for call in calls):
        return False
    for turned, still in zip(calls[::2], calls[1::2], strict=True):
        assert turned.positions is not None
        error = (unrotated(turned.keys, turned.positions) - still.keys).abs().max()
        if float(error) > ROUNDING * float(still.keys.abs().max()):
            return False
    return True


def unrotated(
    vectors: Float[Tensor, "batch heads token head_width"], positions: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch heads token head_width"]:
    """Vectors as they were before the rotary embedding: turned back by the same angles.

    For embeddings that turn the halves of the first `rotary width` coordinates (all, in most models), and
    may scale them (long-context variants); both are undone. `turns_back` tells whether a model's do.
    """
    cosines, sines = (part[:, None].to(vectors.dtype) for part in positions)
    turned, rest = vectors.split([cosines.shape[-1], vectors.shape[-1] - cosines.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    scale = cosines.square() + sines.square()
    back = (turned * cosines + torch.cat([second, -first], dim=-1) * sines) / scale
    return torch.cat([back, rest], dim=-1)
