"""Huginn's published code on given weights: `python recurrent_depth_published.py CHECKOUT FOLDER`.

For an interpreter with the transformers that the published code needs; `recurrent_depth_speed.py` starts it,
with a checkout of `seal-rg/recurrent-pretraining`, whose `recpre/raven_modeling_minimal.py` is the published
model, and a folder of weights and configuration. Prints one JSON line: processor seconds of one thread, the
fastest of three.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROWS, TOKENS, NEW, STEPS = 8, 64, 6, 16


def fastest(call: Callable[[], object]) -> float:
    """Processor seconds."""
    times = []
    for _ in range(3):
        started_s = time.process_time()
        call()
        times.append(time.process_time() - started_s)
    return min(times)


def main() -> None:
    """Load their classes, give them our weights, decode and take one training step."""
    checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(checkout))
    # Of another environment.
    from recpre.raven_config_minimal import RavenConfig  # pyright: ignore[reportMissingImports]
    from recpre.raven_modeling_minimal import (  # pyright: ignore[reportMissingImports]
        RavenForCausalLM,
    )

    torch.set_num_threads(1)
    known = json.loads((folder / "config.json").read_text())
    fields = RavenConfig().to_dict()
    config = RavenConfig(**{name: known[name] for name in fields if name in known})
    model = RavenForCausalLM(config).eval()
    state = torch.load(folder / "weights.pt")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or [name for name in unexpected if "freqs" not in name]:
        raise SystemExit(f"weights do not fit the published model: {missing} {unexpected}")
    prompt = torch.randint(0, 384, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def decode() -> None:
        model.generate(
            prompt,
            max_new_tokens=NEW,
            do_sample=False,
            num_steps=STEPS,
            init_scale=0.0,
            use_cache=True,
        )

    losses = []

    def step() -> None:
        model.zero_grad()
        loss = model(prompt, labels=prompt, num_steps=torch.tensor([12, 4])).loss
        loss.backward()
        losses.append(loss.item())

    seconds = {"decode": fastest(decode)}
    model.train()
    seconds["train"] = fastest(step)
    told = {"rows": ROWS, "tokens": TOKENS, "new": NEW, "prompt": prompt.tolist()}
    print(json.dumps({**told, "seconds": seconds, "loss_nats": losses[-1]}))


if __name__ == "__main__":
    main()
