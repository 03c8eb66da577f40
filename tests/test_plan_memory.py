"""The planner's memory beside torch's allocator: `benchmarks/plan_memory.jsonl`."""

import json
from pathlib import Path

from transformers import LlamaConfig, MixtralConfig

from fourfold_parallel.plan.job import GRID_ON_CPU, Job, Layout
from fourfold_parallel.plan.memory import memory_of
from fourfold_parallel.plan.transformer import Transformer

RECORD = Path(__file__).resolve().parent.parent / "benchmarks" / "plan_memory.jsonl"
ROWS = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048}
KINDS = {
    "llama": lambda width, layers: LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=3 * width, **SIZES
    ),
    "mixtral": lambda width, layers: MixtralConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=width, **SIZES
    ),
}


def test_the_committed_predictions_keep_the_rule_but_where_it_is_said() -> None:
    """Within 8 % and at most 3 % under; by how much it breaks, and where, docs/plan.md says too."""
    broken = [row for row in ROWS if not row["holds"]]
    assert len(ROWS) - len(broken) >= 20
    for row in broken:
        layout = row["layout"]
        if layout["depth"] > 1 and layout["recomputes"]:
            assert 0.08 < row["error"] <= 0.14
        elif layout["experts"] == "exchanged":  # the busiest rank gets more tokens than its share
            assert -0.06 <= row["error"] < -0.03
        else:
            assert (layout["col"], layout["recomputes"]) == (2, True)
            assert -0.061 <= row["error"] < -0.03


def test_the_planner_still_predicts_what_the_record_says() -> None:
    """The prediction of each row, from its sizes."""
    for row in ROWS:
        model = Transformer.of(KINDS[row["model"]](row["width"], row["layers"]))
        job = Job(
            model=model, batch=row["batch"], sequence=row["sequence"], precision="fp32", storage=GRID_ON_CPU
        )  # fmt: skip
        assert round(memory_of(job, Layout(**row["layout"])).peak) == row["predicted_bytes"]
