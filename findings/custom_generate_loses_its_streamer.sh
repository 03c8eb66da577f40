#!/usr/bin/env bash
# transformers 5.23.0: model.generate(custom_generate=CALLABLE, streamer=STREAMER) calls the callable without the streamer.
# generate collects what belongs to the way of decoding (tokenizer, assistant, streamer, synced_gpus), and where custom_generate
# is a callable replaces that collection by the callable's own further arguments instead of adding them. The streamer is a
# parameter of the built-in loops, of which the same callable may be a copy; nothing is streamed and no word is said. synced_gpus
# is lost alike. A callable that names an argument of its own still gets that.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null
cat >"$folder/seen.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Streamer(BaseStreamer):
    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1

    def end(self):
        pass


got = {}


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
           mark=None, **model_kwargs):
    got.update(streamer=streamer, synced_gpus=synced_gpus, mark=mark)
    return input_ids


config = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
)
model = LlamaForCausalLM(config)
tokens = torch.ones(1, 3, dtype=torch.long)
options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
print("transformers", transformers.__version__)
own = Streamer()
model.generate(tokens, streamer=own, **options)
print("the built-in loop: pieces streamed:", own.calls)
model.generate(tokens, custom_generate=decode, streamer=Streamer(), synced_gpus=True, mark="mine", **options)
print("a callable got:", got)
assert own.calls > 1
assert got == {"streamer": None, "synced_gpus": False, "mark": "mine"}
PY
"$folder/venv/bin/python" "$folder/seen.py" 2>/dev/null
# Seen:
# transformers 5.23.0
# the built-in loop: pieces streamed: 5
# a callable got: {'streamer': None, 'synced_gpus': False, 'mark': 'mine'}
