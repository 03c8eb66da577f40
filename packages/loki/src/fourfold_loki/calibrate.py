"""One pass over a text: moments of queries and keys of every layer, streamed; no activation is stored."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_loki.huggingface import attending
from fourfold_loki.plan import Observe, Seen
from fourfold_loki.provenance import Calibrated, fingerprint
from fourfold_loki.sites import attention_modules, is_iterated
from fourfold_loki.statistics import Moments, Statistics
from fourfold_parallel.run.progress import Progress, silent


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: int = 8192,
    context: int = 2048,
    progress: Progress = silent,
) -> Statistics:
    """Statistics of a model over texts that are tokenized and packed into windows.

    Args:
        model: a rotary causal language model of transformers.
        tokenizer: its tokenizer.
        texts: documents, taken in order until there are enough tokens.
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
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, tokens: int, context: int
) -> Int[Tensor, "window context"]:
    """Texts as ids, end to end, cut into windows; what does not fill a window is left out.

    Raises:
        ValueError: where the texts hold fewer tokens.
    """
    needed = max(tokens // context, 1) * context
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(-1, context)
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
        ValueError: for windows longer than the model's context.
    """
    config = model.config.get_text_config()
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens exceed the model's context of "
            f"{config.max_position_embeddings}; use shorter ones"
        )
    layers, kv_heads = layers_of(model), config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys, queries, keys_before, queries_before = (
        Moments.empty(layers, kv_heads, width) for _ in range(4)
    )

    def take(seen: Seen) -> None:
        queries_of = seen.queries.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        keys.add_(seen.layer, seen.keys)
        queries.add_(seen.layer, queries_of)
        if seen.positions is None:
            return  # then nothing is known of keys before rotary, and `fit` refuses that stage
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
        source=Calibrated(
            model=fingerprint(model),
            corpora=(hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest(),),
            tokens=ids.numel(),
        ),
    )


@torch.no_grad()
def layers_of(model: PreTrainedModel) -> int:
    """Attention layers; of a model that iterates them, the attention calls of a pass at its default depth."""
    if not is_iterated(model):
        return len(attention_modules(model))
    calls: list[int] = []
    with attending(model, Observe(observer=lambda seen: calls.append(seen.layer))):
        model.base_model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    return len(calls)


def unrotated(
    vectors: Float[Tensor, "batch heads token head_width"], positions: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch heads token head_width"]:
    """Vectors as they were before the rotary embedding: turned back by the same angles.

    The embedding turns the halves of the first `rotary width` coordinates (all, in most models), and may
    scale them (long-context variants); both are undone.
    """
    cosines, sines = (part[:, None].to(vectors.dtype) for part in positions)
    turned, rest = vectors.split([cosines.shape[-1], vectors.shape[-1] - cosines.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    scale = cosines.square() + sines.square()
    back = (turned * cosines + torch.cat([second, -first], dim=-1) * sines) / scale
    return torch.cat([back, rest], dim=-1)
