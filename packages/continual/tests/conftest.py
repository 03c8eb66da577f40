"""A small model with its tokenizer, and two texts of one's own that share few words."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.tokenizers import SharedBytePairs

OLD = "the grid holds four axes and every axis carries one kind of split of the work"
NEW = "def loss(model, rows): return sum(model(row) for row in rows) / len(rows)  # mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder with a model, and its texts."""

    model: Path
    old: Path
    new: Path

    def tokenizer(self) -> SharedBytePairs:
        corpora = tuple(TextFiles(paths=(path,), licence="ours") for path in (self.old, self.new))
        return SharedBytePairs(corpora=corpora, vocabulary=320)

    def source(self, path: Path, held_out: float = 0.2) -> Packed:
        corpus = TextFiles(paths=(path,), licence="made here")
        return Packed(corpus=corpus, tokenizer=self.tokenizer(), held_out=held_out)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this session only, shared by its tests."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FOURFOLD_CACHE", str(base))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    paths = []
    for name, sentence in (("old", OLD), ("new", NEW)):
        words = sentence.split()
        text = " ".join(words[(i * i + 3 * i) % len(words)] for i in range(3000))
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    place = Place(model=folder / "model", old=paths[0], new=paths[1])
    corpus = TextFiles(paths=(place.old,), licence="made here")
    tokenizer = place.tokenizer().load(corpus.load()).tokenizer
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=len(tokenizer), max_position_embeddings=64,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    return place
