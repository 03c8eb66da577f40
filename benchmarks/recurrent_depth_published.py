"""Huginn's published code on given weights: `python recurrent_depth_published.py CHECKOUT FOLDER`.

For an interpreter with the transformers that the published code needs (4.52 does); `recurrent_depth_speed.py`
starts it, with a checkout of `seal-rg/recurrent-pretraining`, whose `recpre/raven_modeling_minimal.py` is the
published model, and a folder of weights and configuration. Answers each line of its input, a way (`decode` or
`train`) with its arguments as JSON, with one: processor seconds of one thread, and what came out.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch


def main() -> None:
    """Load their classes, give them our weights, and perform what is asked."""
    checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
    package = ModuleType("recpre")  # its own __init__ imports what their training needs
    package.__path__ = [str(checkout / "recpre")]
    sys.modules["recpre"] = package
    # Of another environment.
    from recpre.raven_config_minimal import RavenConfig  # pyright: ignore[reportMissingImports]
    from recpre.raven_modeling_minimal import (  # pyright: ignore[reportMissingImports]
        RavenForCausalLM,
    )

    torch.set_num_threads(1)
    known = json.loads((folder / "config.json").read_text())
    fields = inspect.signature(RavenConfig).parameters.keys() - {
        "transformers_version",
        "torch_dtype",
    }
    config = RavenConfig(**{name: known[name] for name in fields if name in known})
    model = RavenForCausalLM(config).eval()
    state = torch.load(folder / "weights.pt")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or [name for name in unexpected if "freqs" not in name]:
        raise SystemExit(f"weights do not fit the published model: {missing} {unexpected}")

    @torch.no_grad()
    def decode(tokens: list[list[int]], new: int, steps: int) -> list[list[int]]:
        prompt = torch.tensor(tokens)
        out = model.generate(
            prompt,
            max_new_tokens=new,
            do_sample=False,
            num_steps=steps,
            init_scale=0.0,
            use_cache=True,
        )
        return out[:, prompt.shape[1] :].tolist()

    def train(tokens: list[list[int]], steps: list[int]) -> float:
        model.train()
        model.zero_grad()
        rows = torch.tensor(tokens)
        labels = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], -100)], dim=1)
        depth = torch.tensor(steps)
        loss = model(rows, labels=labels, num_steps=depth, init_scale=0.0).loss
        loss.backward()
        model.eval()
        return loss.item()

    ways: dict[str, Callable[..., object]] = {"decode": decode, "train": train}
    for line in sys.stdin:
        way, arguments = json.loads(line)
        started_s = time.process_time()
        result = ways[way](**arguments)
        seconds = time.process_time() - started_s
        print(json.dumps({"seconds": seconds, "result": result}), flush=True)


if __name__ == "__main__":
    main()
