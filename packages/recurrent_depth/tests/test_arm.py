"""The blocks in C++, compiled for 64-bit ARM processors and run under an emulator, give what modules give."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold_parallel.common import native as runtime
from fourfold_parallel.testing import machine_code
from fourfold_recurrent_depth.fast import compiled as native

ROUNDING = 3e-5
"""As in test_compiled.py."""
MAIN = """
// A pass without cache and mask: rows, whether it adapts, rotary floats; the pass's sizes, slots, blocks.
int main() {
    const auto counts = read<int64_t>(3);
    Pass pass{};
    std::memcpy(&pass, read<int64_t>(13).data(), 13 * sizeof(int64_t));
    pass.eps = read<float>(1)[0];
    const auto slots = read<int64_t>(pass.steps);
    const int64_t width = pass.width, hidden = pass.hidden, all = counts[0] * pass.tokens * width;
    std::vector<std::vector<float>> held;
    const auto floats = [&](int64_t count) {
        held.push_back(read<float>(count));
        return held.back().data();
    };
    std::vector<Block> blocks(pass.layers);
    for (Block& block : blocks) {
        for (const float*& gain : block.gains) gain = floats(width);
        block.into_heads = floats(3 * width * width);
        block.bias = floats(2 * width);
        block.out_of_heads = floats(width * width);
        block.into_hidden = floats(2 * hidden * width);
        block.out_of_hidden = floats(width * hidden);
        if (!pass.packs) continue;
        held.emplace_back(width * (4 * width + 3 * hidden));
        fourfold_pack(&block, width, hidden, held.back().data());
        block.panels = held.back().data();
    }
    if (counts[1]) {
        pass.adapter = floats(2 * width * width);
        pass.injected = floats(all);
    }
    pass.rotary = floats(counts[2]);
    float* x = const_cast<float*>(floats(all));
    std::vector<float> keys(all), values(all);
    const int64_t head = pass.tokens * pass.head_width();
    pass.cached = pass.own = {keys.data(), values.data(), 0, 0, head * pass.heads, head, nullptr};
    pass.blocks = blocks.data();
    pass.slots = slots.data();
    fourfold_recur(&pass, x, 0, counts[0]);
    std::fwrite(x, sizeof(float), all, stdout);
}
"""


class OnArm:
    """Stands for the compiled library: each call is one of the emulator."""

    def __init__(self, kind: str, folder: Path) -> None:
        text = (
            runtime.whole_source("fourfold_recurrent_depth.fast", "recurrence.cpp")
            + machine_code.READ
            + MAIN
        )
        self.built = machine_code.built_for_arm(text, kind, folder)
        self.calls = 0

    def fourfold_pack(self, *_: Any) -> None:
        """The program packs for itself."""

    def fourfold_recur(self, arguments: Any, states: Any, first: Any, last: Any) -> None:
        """Copy what the pass points to, and its states back."""
        made, rows = arguments._obj, last.value
        assert first.value == 0
        assert made.mask is None
        tokens, width, heads, hidden, _, layers, steps, of_row, of_token = made.sizes[:9]
        rotary = (rows - 1) * of_row + (tokens - 1) * of_token + width // heads
        given = [torch.tensor([rows, made.adapter is not None, rotary]).numpy().tobytes()]
        given += [bytes(made.sizes), bytes(ctypes.c_float(made.eps))]
        given.append(ctypes.string_at(made.slots, 8 * steps))

        def floats(address: int | None, count: int) -> None:
            given.append(ctypes.string_at(address, 4 * count))

        for block in (native._Block * layers).from_address(made.blocks):
            for gain in block.gains:
                floats(gain, width)
            products = (
                3 * width * width,
                2 * width,
                width * width,
                2 * hidden * width,
                width * hidden,
            )
            for address, count in zip(block.weights, products, strict=True):
                floats(address, count)
        if made.adapter is not None:
            floats(made.adapter, 2 * width * width)
            floats(made.injected, rows * tokens * width)
        floats(made.rotary, rotary)
        floats(states.value, rows * tokens * width)
        written = machine_code.run_on_arm(self.built, given=b"".join(given))
        ctypes.memmove(states, written, 4 * rows * tokens * width)
        self.calls += 1


@pytest.mark.skipif(not machine_code.can_emulate(), reason=machine_code.NEED)
@pytest.mark.parametrize("kind", list(machine_code.ARM))
@pytest.mark.parametrize("tokens", [5, 20])
def test_arms_blocks_are_the_modules(
    tiny: Any, kind: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prelude, three recurrences and coda; few tokens, and enough for weights to be packed."""
    on_arm = OnArm(kind, tmp_path)
    rows = torch.randint(
        0, tiny.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1)
    )
    outputs = []
    for library in (None, on_arm):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        with torch.no_grad():
            outputs.append(tiny(rows, num_steps=3, init_scale=0.0, use_cache=False).logits)
    assert on_arm.calls == 3
    torch.testing.assert_close(*outputs, atol=ROUNDING, rtol=ROUNDING)
