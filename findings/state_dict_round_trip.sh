#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.state_dict.get_state_dict gives a state that set_state_dict refuses for an
# equal model and optimizer, in one process and with full_state_dict=True:
#   - AdamW, where one parameter has had no gradient yet: "Missing optimizer state for parameter ...";
#   - SGD without momentum, whose state is empty by design: a bare AssertionError, "Expected device to be set".
# strict=False, which the first message proposes, also accepts a state that lacks what it should hold.
# The optimizers' own state_dict and load_state_dict take both. Whoever saves through one pair and loads through the other
# finds out at the first resume of a model with a frozen or unused part.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/seen.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

FULL = StateDictOptions(full_state_dict=True)


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def stepped(kind, **options):
    model = PartlyUsed()
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def round_trip(kind, **options):
    """What torch's checkpoint functions say, and whether the optimizer's own pair takes the same state."""
    saved = get_state_dict(*stepped(kind, **options), options=FULL)
    model = PartlyUsed()
    optimizer = kind(model.parameters(), **options)
    try:
        set_state_dict(
            model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=FULL
        )
        said = "accepted"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).split('.')[0]}"
    plain = stepped(kind, **options)[1]
    optimizer.load_state_dict(plain.state_dict())
    print(f"{kind.__name__}: {said}; its own load_state_dict: accepted")
    return said


print("torch", torch.__version__)
seen = (round_trip(torch.optim.AdamW), round_trip(torch.optim.SGD, lr=0.1))
expected = ("RuntimeError: Missing optimizer state for parameter 'unused", "AssertionError: Expected device to be set")
raise SystemExit(0 if seen == expected else 1)
PY
"$folder/venv/bin/python" "$folder/seen.py"
