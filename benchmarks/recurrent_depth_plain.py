"""The published algorithm written plainly, on the weights of one of our models: what we are timed against.

One tensor per token and slot in dictionaries, the adapter over a concatenation, norms and rotations as
separate steps, coda and head at every exit check, activation checkpoints per recurrence in training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold_recurrent_depth import RecurrentDepthForCausalLM


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, step by step."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight


def rotate(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q and k: (batch, token, head, width); table: (1, token, 1, width / 2, 2)."""
    both = torch.cat([q, k], dim=2)
    pairs = both.float().reshape(*both.shape[:-1], -1, 2)
    cos, sin = table[..., 0], table[..., 1]
    turned = torch.stack(
        [
            pairs[..., 0] * cos - pairs[..., 1] * sin,
            pairs[..., 1] * cos + pairs[..., 0] * sin,
        ],
        dim=-1,
    ).flatten(3)
    turned = turned.type_as(both)
    return turned[:, :, : q.shape[2]], turned[:, :, q.shape[2] :]


class DictionaryCache:
    """slot -> position -> (batch, head, width), for keys and for values."""

    def __init__(self, core_layers: int, around: int) -> None:
        self.keys: dict[int, dict[int, Tensor]] = {}
        self.values: dict[int, dict[int, Tensor]] = {}
        self.core_layers, self.around = core_layers, around
        self.seen = 0

    def update(self, k: Tensor, v: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Store each new token, then read every token at its deepest slot up to this one."""
        if slot == 0:
            self.seen += k.shape[2]
        for states, store in ((k, self.keys), (v, self.values)):
            held = store.setdefault(slot, {})
            for offset, state in enumerate(states.unbind(2)):
                held[self.seen - k.shape[2] + offset] = state
        return self._latest(self.keys, slot), self._latest(self.values, slot)

    def _latest(self, store: dict[int, dict[int, Tensor]], slot: int) -> Tensor:
        found = []
        for position in range(self.seen):
            at = slot
            while position not in store.get(at, {}):
                at -= self.core_layers
            found.append(store[at][position])
        return torch.stack(found, dim=2)


class Plain:
    """The plain algorithm over a model's weights."""

    def __init__(self, model: RecurrentDepthForCausalLM) -> None:
        self.model, self.config = model, model.config
        self.parts: Any = model.parts()

    def attention(self, block: Any, x: Tensor, table: Tensor, cache: Any, slot: int) -> Tensor:
        """Attention of one block."""
        batch, tokens, width = x.shape
        heads = self.config.n_heads
        q, k, v = block.attn.Wqkv(x).split(width, dim=-1)
        q, k, v = (one.view(batch, tokens, heads, -1) for one in (q, k, v))
        bias = block.attn.qk_bias
        q, k = rotate(q + bias[0], k + bias[1], table)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, slot)
        mask = None
        if 1 < tokens < k.shape[2]:
            mask = torch.ones(tokens, k.shape[2], dtype=torch.bool).tril(k.shape[2] - tokens)
        is_causal = tokens > 1 and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return block.attn.proj(out.transpose(1, 2).reshape(batch, tokens, width))

    def block(self, block: Any, x: Tensor, table: Tensor, cache: Any, slot: int) -> Tensor:
        """A sandwich block."""
        attended = self.attention(block, norm(x, block.norm_1.weight), table, cache, slot)
        x = norm(attended + x, block.norm_2.weight)
        gate, up = block.mlp.fc(norm(x, block.norm_3.weight)).chunk(2, dim=-1)
        return norm(block.mlp.proj(F.silu(gate) * up) + x, block.norm_4.weight)

    def prelude(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """P(tokens), and the rotations of the tokens fed."""
        first = 0 if cache is None else cache.seen
        table = self.model.freqs_cis[:, first : first + tokens.shape[1]]
        x = self.parts["wte"](tokens) * math.sqrt(self.config.n_embd)
        for slot, block in enumerate(self.parts["prelude"]):
            x = self.block(block, x, table, cache, slot)
        return x, table

    def recur(self, s: Tensor, e: Tensor, table: Tensor, cache: Any, step: int) -> Tensor:
        """R(e, s)."""
        s = F.linear(torch.cat([s, e], dim=-1), self.parts["adapter"].weight)
        core = self.parts["core_block"]
        around = self.config.n_layers_in_prelude + self.config.n_layers_in_coda
        for layer, block in enumerate(core):
            s = self.block(block, s, table, cache, around + step * len(core) + layer)
        return s

    def predict(self, s: Tensor, table: Tensor, cache: Any) -> Tensor:
        """C(s)."""
        gain = self.parts["ln_f"].weight
        x = norm(s, gain)
        for layer, block in enumerate(self.parts["coda"]):
            x = self.block(block, x, table, cache, self.config.n_layers_in_prelude + layer)
        return self.model.lm_head(norm(x, gain)).float()

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, *, new: int, steps: int, threshold: float | None
    ) -> tuple[Tensor, list[list[int]]]:
        """Greedy tokens from zero states; with a threshold, KL exits, the batch to its slowest row."""
        cache = DictionaryCache(
            self.config.n_layers_in_recurrent_block,
            self.config.n_layers_in_prelude + self.config.n_layers_in_coda,
        )
        tokens, taken = prompt, []
        fed = prompt
        for _ in range(new):
            e, table = self.prelude(fed, cache)
            s = torch.zeros_like(e)
            rows = len(prompt)
            stopped: list[int] = [0] * rows
            chosen = torch.zeros(rows, self.config.padded_vocab_size)
            log_before = torch.full_like(chosen, -math.log(self.config.padded_vocab_size))
            for step in range(steps):
                s = self.recur(s, e, table, cache, step)
                if threshold is None:
                    continue
                logits = self.predict(s, table, cache)[:, -1]
                log_p = F.log_softmax(logits, dim=-1)
                change = (log_before.exp() * (log_before - log_p)).sum(-1)
                log_before = log_p
                for row in range(rows):
                    if not stopped[row] and (bool(change[row] < threshold) or step == steps - 1):
                        stopped[row], chosen[row] = step + 1, logits[row]
                if all(stopped):
                    break
            if threshold is None:
                chosen = self.predict(s, table, cache)[:, -1]
            taken.append(stopped)
            fed = chosen.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, fed], dim=1)
        return tokens[:, prompt.shape[1] :], taken

    def loss(self, tokens: Tensor, *, without: int, with_gradient: int) -> Tensor:
        """Next-token loss at (n, k), a checkpoint for every recurrence with gradient."""
        e, table = self.prelude(tokens, None)
        s = torch.zeros_like(e)
        with torch.no_grad():
            for step in range(without):
                s = self.recur(s, e, table, None, step)
        for step in range(with_gradient):
            s = checkpoint(self.recur, s, e, table, None, step, use_reentrant=False)
            assert isinstance(s, Tensor)
        logits = self.predict(s, table, None)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
