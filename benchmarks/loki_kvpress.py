"""Decoding over a cache that kvpress has thinned: `python loki_kvpress.py MODEL TOKENS SHARE`.

For an interpreter that has kvpress and an older transformers; `loki_decode.py` starts it. Prints one JSON
line with milliseconds a token, of the whole cache and of the share that the press keeps.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version

import torch
from kvpress import KnormPress  # pyright: ignore[reportMissingImports] - of another environment
from transformers import AutoModelForCausalLM, DynamicCache

TOKENS = 16


@torch.no_grad()
def main() -> None:
    """Fill, press, decode."""
    place, length, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    # kvpress thins what a prompt leaves; the same tokens in a prompt of blocks are too slow here.
    ids = torch.randint(0, 1000, (1, min(length, 2048)))
    config = model.config
    times: dict[str, list[float]] = {"dense": [], "pressed": []}
    caches: dict[str, DynamicCache] = {}
    for name, kept in (("dense", length), ("pressed", int(length * share))):
        cache = caches[name] = DynamicCache()
        if name == "pressed":
            with KnormPress(1 - share)(model):
                model(ids, past_key_values=cache)
        else:
            model(ids, past_key_values=cache)
        held = cache.get_seq_length()
        for layer in range(config.num_hidden_layers):
            more = torch.randn(
                2, 1, config.num_key_value_heads, max(0, kept - held), config.head_dim
            )
            cache.update(more[0], more[1], layer)
    token = ids[:, -1:]
    for _ in range(TOKENS):  # in turns, so that a busy machine slows both alike
        for name, cache in caches.items():
            started_s = time.perf_counter()
            model(token, past_key_values=cache, position_ids=torch.full((1, 1), length))
            times[name].append(1e3 * (time.perf_counter() - started_s))
    ms = {name: statistics.median(each) for name, each in times.items()}
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    print(
        json.dumps(
            {"median_ms": ms, "over_dense": ms["dense"] / ms["pressed"], "versions": versions}
        )
    )


if __name__ == "__main__":
    main()
