#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict steps an optimizer that has no state yet, with
# zero gradients and a learning rate of zero, and leaves that step in its state. The weights do not move, but AdamW counts its
# next update as the second: with lr=0.1 and a gradient of ones the first update moves a weight by 0.0744 instead of 0.1.
# Whoever saves a checkpoint before the first update (step 0) trains another model afterwards, without a word.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/seen.py" <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def moved(saves):
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = model.weight.detach().clone()
    if saves:
        get_optimizer_state_dict(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return (before - model.weight).abs().max().item(), optimizer.state[model.weight]["step"].item()


print("torch", torch.__version__)
plain, saved = moved(False), moved(True)
print(f"first update: {plain[0]:.4f} (step {plain[1]:.0f}); after a save: {saved[0]:.4f} (step {saved[1]:.0f})")
changed = abs(plain[0] - 0.1) > 1e-4 or plain[1] != 1 or abs(saved[0] - 0.0744) > 1e-3 or saved[1] != 2
raise SystemExit(int(changed))
PY
"$folder/venv/bin/python" "$folder/seen.py"
