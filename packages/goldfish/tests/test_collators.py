"""The mask in other people's training scripts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fourfold_goldfish import Goldfish, add_goldfish, goldfish_collator
from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling
from fourfold_goldfish.dropins.collators import LENGTHS, document_ids, mask_labels
from fourfold_goldfish.dropins.mask_digest import (
    check_mask_digest,
    mask_digest,
    write_mask_digest,
)
from fourfold_parallel.run.models import Llama

GOLDFISH = Goldfish(k=2, context=4)
TINY = Llama(
    width=16, depth=1, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=64, tied=True
)


def word_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """64 words w0 to w63, of which w0 pads."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side=side
    )


def examples(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(len(lengths))
    draws = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids.tolist()} for ids in draws]


def alone(example: dict[str, Any]) -> Tensor:
    """The mask of one document by itself."""
    return GOLDFISH.drop(torch.tensor([example["input_ids"]]))[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_masked_as_its_documents_are_alone(side: str) -> None:
    """Whatever the padding, which stays out of every window."""
    documents = examples(30, 12, 21)
    plain = DataCollatorForLanguageModeling(word_tokenizer(side), mlm=False)
    unmasked, masked = plain(documents), goldfish_collator(plain, GOLDFISH)(documents)
    for row, document in enumerate(documents):
        real = unmasked["attention_mask"][row].bool()
        dropped = masked["labels"][row][real] == -100
        assert torch.equal(dropped, alone(document))
        kept = masked["labels"][row][real][~dropped]
        assert torch.equal(kept, unmasked["labels"][row][real][~dropped])
    assert torch.equal(masked["input_ids"], unmasked["input_ids"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"position_ids_start": 2},
    ],
)
def test_flattened_documents_are_masked_as_they_are_alone(options: dict[str, Any]) -> None:
    """However the batch tells its documents."""
    documents = examples(30, 12, 21)
    batch = goldfish_collator(DataCollatorWithFlattening(**options), GOLDFISH)(documents)
    begin = 0
    for document in documents:
        length = len(document["input_ids"])
        dropped = batch["labels"][0, begin + 1 : begin + length] == -100
        assert torch.equal(dropped, alone(document)[1:])
        begin += length


@pytest.mark.parametrize("name", LENGTHS)
def test_cumulative_lengths_count_through_all_rows(name: str) -> None:
    """Padding behind the last document is one of its own."""
    batch = {"input_ids": torch.zeros(2, 5).long(), name: [0, 3, 5, 6, 9]}
    assert document_ids(batch).tolist() == [[1, 1, 1, 2, 2], [1, 2, 2, 2, 3]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, r"cu_seq_lens_q=\[0, 4, 9\] are not"),
        ({"cu_seqlens": torch.tensor([2, 8])}, "cumulative lengths, from 0, of documents of 8 ids"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, r"attention_mask of shape \(1, 1, 8, 8\)"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids of shape \(1, 4\)"),
    ],
)
def test_documents_that_cannot_be_told_are_refused(extra: dict[str, Any], message: str) -> None:
    tokens = torch.arange(3, 11)[None]
    with pytest.raises(ValueError, match=message):
        mask_labels({"input_ids": tokens, "labels": tokens, **extra}, GOLDFISH)


def test_one_row_of_positions_stands_for_all() -> None:
    tokens = torch.zeros(2, 4).long()
    for positions in (torch.tensor([0, 1, 0, 1]), torch.tensor([[0, 1, 0, 1]])):
        batch = {"input_ids": tokens, "position_ids": positions}
        assert document_ids(batch).tolist() == [[0, 0, 1, 1]] * 2


def test_rows_packed_with_end_tokens_are_masked_as_their_documents_are_alone() -> None:
    """Without `position_ids`, the ids that end a document say where the next begins."""
    documents = examples(30, 12, 21)
    packed = [token for document in documents for token in [*document["input_ids"], 2]]
    batch = {"input_ids": torch.tensor([packed]), "labels": torch.tensor([packed])}
    masked = mask_labels(batch, GOLDFISH, separators=(2,))
    begin = 0
    for document in documents:
        length = len(document["input_ids"])
        dropped = masked["labels"][0, begin : begin + length] == -100
        assert torch.equal(dropped, alone(document))
        begin += length + 1


@pytest.mark.parametrize("padding_free", [False, True])
def test_trl_prompts_stay_masked_and_are_hashed_as_they_are(padding_free: bool) -> None:
    """TRL's collator sets a prompt's labels to -100; windows that reach into it see its ids."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

    documents = examples(30, 12, 21)
    for document in documents:
        ids = document["input_ids"]
        document["labels"] = [-100] * 6 + ids[6:]
    plain = TrlCollator(pad_token_id=0, padding_free=padding_free)
    unmasked = plain(documents)
    masked = goldfish_collator(plain, GOLDFISH)(documents)
    was_ignored = unmasked["labels"] == -100
    assert bool((masked["labels"][was_ignored] == -100).all())
    begin = 0
    for row, document in enumerate(documents):
        length = len(document["input_ids"])
        labels = masked["labels"][0, begin:] if padding_free else masked["labels"][row]
        assert torch.equal(labels[6:length] == -100, alone(document)[6:])
        begin += length


def test_documents_begin_at_positions_indices_and_separators() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 2, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]]),
    }
    assert document_ids(batch).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert document_ids(batch, separators=(2,)).tolist() == [[0, 0, 0, 1, 2, 2]]
    assert document_ids({**batch, "seq_idx": torch.tensor([[0, 1, 1, 1, 1, 1]])}).tolist() == [
        [0, 1, 1, 1, 2, 2]
    ]


def trainer(folder: Path, *, steps: int = 4, **arguments: Any) -> Trainer:
    """A tiny Llama over 16 documents, two microbatches a step."""
    options = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        eval_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        **arguments,
    )
    tokenizer = word_tokenizer()
    return Trainer(
        model=TINY.build(seed=0),
        args=options,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=examples(*range(14, 30)),  # type: ignore[arg-type]
        eval_dataset=examples(24, 24, 24),  # type: ignore[arg-type]
        processing_class=tokenizer,
    )


def test_a_trainer_divides_by_the_targets_that_are_kept(tmp_path: Path) -> None:
    """`num_items_in_batch` is exact, over microbatches of unequal counts, and evaluation is unmasked."""
    ours = trainer(tmp_path)
    add_goldfish(ours, GOLDFISH)
    seen: list[tuple[int, int]] = []
    plain_loss = ours.compute_loss

    def compute_loss(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        kept = int((inputs["labels"][:, 1:] != -100).sum())
        if model.training:
            seen.append((kept, int(options["num_items_in_batch"])))
        else:
            # Every unpadded target counts.
            assert kept == int(inputs["attention_mask"][:, 1:].sum())
        return plain_loss(model, inputs, *rest, **options)

    ours.compute_loss = compute_loss  # type: ignore[method-assign]
    ours.train()
    assert len(seen) == 8
    for (first, total), (second, same_total) in zip(seen[::2], seen[1::2], strict=True):
        assert first + second == total == same_total
    evaluated = ours.evaluate()["eval_loss"]
    plain = trainer(tmp_path)
    plain.model.load_state_dict(ours.model.state_dict())
    assert evaluated == plain.evaluate()["eval_loss"]


def test_a_checkpoint_of_another_mask_is_not_resumed(tmp_path: Path) -> None:
    """The same mask goes on; another k, key or no mask is refused by name, wherever it lies."""
    first = trainer(tmp_path, steps=2)
    add_goldfish(first, GOLDFISH)
    first.train()
    checkpoint = (tmp_path / "checkpoint-2").rename(tmp_path / "elsewhere")
    same = trainer(tmp_path, steps=4)
    add_goldfish(same, GOLDFISH)
    same.train(resume_from_checkpoint=str(checkpoint))
    assert same.state.global_step == 4
    for other, words in (
        (Goldfish(k=3, context=4), "k=2 there, 3 now"),
        (Goldfish(k=2, context=4, key=9), "key_sha256="),
    ):
        changed = trainer(tmp_path, steps=4)
        add_goldfish(changed, other)
        with pytest.raises(ValueError, match=re.escape(words)):
            changed.train(resume_from_checkpoint=str(checkpoint))
    unmasked = trainer(tmp_path, steps=2)
    unmasked.train()
    masked = trainer(tmp_path, steps=4)
    add_goldfish(masked, GOLDFISH)
    with pytest.raises(ValueError, match="step 2 names no mask"):
        masked.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_folder_says_which_mask_it_was_trained_under(tmp_path: Path) -> None:
    """For loops that are no Trainer's."""
    with pytest.raises(ValueError, match="names no mask"):
        check_mask_digest(tmp_path, mask_digest(GOLDFISH, None))
    write_mask_digest(tmp_path, mask_digest(GOLDFISH, None))
    check_mask_digest(tmp_path, mask_digest(GOLDFISH, None))
    with pytest.raises(ValueError, match="k=2 there, 3 now"):
        check_mask_digest(tmp_path, mask_digest(Goldfish(k=3, context=4), None))


def test_a_second_mask_on_one_trainer_is_refused(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    add_goldfish(ours, GOLDFISH)
    with pytest.raises(ValueError, match="masked already"):
        add_goldfish(ours, GOLDFISH)


def test_accelerate_prepares_a_masked_loader() -> None:
    """The collator is one value that a loader's workers can hold."""
    documents = examples(30, 12, 21, 18)
    plain = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)
    loader = DataLoader(
        documents,  # type: ignore[arg-type]
        batch_size=2,
        collate_fn=goldfish_collator(plain, GOLDFISH),
        num_workers=1,
    )
    prepared = Accelerator(cpu=True).prepare(loader)
    batches = [*prepared]
    for index, document in enumerate(documents):
        labels = batches[index // 2]["labels"][index % 2][: len(document["input_ids"])]
        assert torch.equal(labels == -100, alone(document))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": torch.ones(1, 20, dtype=torch.long)}, "no tensors input_ids and labels"),
        (
            {
                "input_ids": torch.ones(1, 20, dtype=torch.long),
                "labels": torch.ones(1, 19, dtype=torch.long),
            },
            "(1, 19)",
        ),
    ],
)
def test_a_batch_that_cannot_be_masked_is_refused(batch: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        mask_labels(batch, GOLDFISH)


def test_trls_trainer_trains_on_completions_with_gaps(tmp_path: Path) -> None:
    """One line on an SFTTrainer: prompts stay masked, completions have the gaps of the whole text."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    draws = examples(*[30] * 8)
    words = [[f"w{token}" for token in draw["input_ids"]] for draw in draws]
    rows = [{"prompt": " ".join(w[:8]), "completion": " " + " ".join(w[8:])} for w in words]
    tokenizer = word_tokenizer()
    options = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
    )
    sft = SFTTrainer(
        model=TINY.build(seed=0),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    plain = {tuple(row["input_ids"]): row["labels"] for row in sft.train_dataset}
    add_goldfish(sft, GOLDFISH)
    for batch in sft.get_train_dataloader():
        for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            real = tokens[tokens != 0]
            unmasked = torch.tensor(plain[tuple(real.tolist())])
            assert bool((unmasked[:8] == -100).all())
            expected = unmasked.masked_fill(GOLDFISH.drop(real[None])[0], -100)
            assert torch.equal(labels[: len(real)], expected)
    sft.train()
    assert sft.state.global_step == 2


MODES: dict[str, dict[str, object]] = {
    "padding free": {"padding_free": True, "max_length": None},
    "packed, best fit": {"packing": True, "packing_strategy": "bfd", "max_length": 64},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
}
"""Ways in which TRL lays documents side by side."""


@pytest.mark.filterwarnings(
    "ignore"
)  # without flash attention documents see one another, which TRL says
@pytest.mark.parametrize("mode", MODES)
def test_trls_packed_rows_have_each_document_s_own_gaps(tmp_path: Path, mode: str) -> None:
    """As where each document is a row, however they are laid; wrapped rows know them by an end id."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    draws = [[*draw["input_ids"][:-1], 1] for draw in examples(30, 12, 25, 18, 9, 40, 22, 14)]
    options = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        dataloader_pin_memory=False, **MODES[mode],  # type: ignore[arg-type]
    )  # fmt: skip
    sft = SFTTrainer(
        model=TINY.build(seed=0),
        args=options,
        train_dataset=Dataset.from_list([{"input_ids": draw} for draw in draws]),
        processing_class=word_tokenizer(),
    )
    separators = (1,) if mode == "packed, wrapped" else ()
    mask = Goldfish(k=2, context=4, boundary="prefix")
    gaps = {tuple(draw): mask.drop(torch.tensor([draw]))[0].tolist() for draw in draws}
    add_goldfish(sft, mask, separators=separators)
    whole = 0
    for batch in sft.get_train_dataloader():
        for tokens, labels in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
        ):
            for first in range(len(tokens)):
                for draw, gap in gaps.items():
                    if tuple(tokens[first : first + len(draw)]) == draw:
                        left_out = [label == -100 for label in labels[first : first + len(draw)]]
                        assert left_out[1:] == gap[1:]
                        whole += 1
    assert whole >= 6  # wrapping may cut a document in two


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer"])
def test_a_trainer_that_compares_completions_is_refused(tmp_path: Path, name: str) -> None:
    """By TRL's name, also where it was subclassed."""
    comparing = type("Mine", (type(name, (type(trainer(tmp_path, steps=1)),), {}),), {})
    ours = comparing.__new__(comparing)
    with pytest.raises(ValueError, match=f"{name} compares whole completions"):
        add_goldfish(ours, GOLDFISH)


def test_a_trainer_takes_the_mask_that_near_duplicates_share(tmp_path: Path) -> None:
    """And its checkpoints tell it from a hash of ids."""
    tokenizer = word_tokenizer()
    mask = CanonicalGoldfish(k=2, characters=8, spelling=Spelling.of(tokenizer))
    ours = trainer(tmp_path, steps=2)
    add_goldfish(ours, mask)
    for batch in ours.get_train_dataloader():
        dropped = mask.drop(batch["input_ids"], document_ids(batch))
        assert bool((batch["labels"][dropped] == -100).all())
        real = batch["attention_mask"].bool() & ~dropped
        assert bool((batch["labels"][real] != -100).all())
    ours.train()
    other = trainer(tmp_path, steps=4)
    add_goldfish(other, GOLDFISH)
    with pytest.raises(ValueError, match="hash=canonical there, ordered now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
