"""Samples as rows of tokens: whole samples packed into rows, each blind to the others, prompts masked or not.

A token of its own ends the prompt, so that no merge of the tokenizer reaches across and the mask is exact by
construction. Generation gives the same token after the prompt, which is data: it may spell the token's name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fourfold_hpc_coder.instruct.pipeline import (
    Instructions,
    held_out,
    make_samples,
    makers,
    templates,
)
from fourfold_hpc_coder.instruct.samples import InstructionSample, read_samples
from fourfold_hpc_coder.instruct.teachers import Templates
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import cache_folder, sha256_of, whole_folder
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.data import Batch, TokenFile, TokenStream
from fourfold_parallel.run.objective import IGNORE, MicrobatchLoss, TargetMask, token_nats
from fourfold_parallel.run.tokenizers import LoadedTokenizer, beginning, encoded

END = "<|end|>"
RESPONSE = "<|response|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The two tokens that give a row its structure; text never holds them."""

    end: int = 0
    """Ends a sample, and fills the rest of a row."""
    response: int = 1
    """Ends the prompt."""


OURS = Marks()
"""Of the tokenizer that is trained here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodePairs:
    """A byte-level BPE trained on what the grammar teaches: the same for every arm of a study."""

    vocabulary: int
    samples: int
    """Taught samples that it is trained on; unverified, since no model learns from them."""

    def fast(self) -> PreTrainedTokenizerFast:
        """Train it, or read it from the cache."""
        return _open_tokenizer(self._folder())

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """The same for any documents."""
        return LoadedTokenizer(tokenizer=self.fast(), end=OURS.end, material=self.material())

    def _folder(self) -> Path:
        key = hashlib.sha256(f"{makers()} {digest(self)}".encode()).hexdigest()[:24]
        folder = cache_folder() / "hpc_coder" / "tokenizers" / key
        if not folder.exists():
            if self.vocabulary < 258:
                raise ValueError(
                    f"vocabulary={self.vocabulary} does not hold the 256 bytes and two signs; use 258"
                )
            recipe = templates(self.samples, models=("serial", "omp"), verified=False)
            texts = [sample.instruction + sample.answer for sample in make_samples(recipe).samples]
            trained = Trained(models.BPE())
            # Merges may cross words and lines: what the grammar repeats becomes one token, so that a very
            # small model sees whole samples in a few tokens.
            trained.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=False
            )
            trained.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=self.vocabulary,
                special_tokens=[END, RESPONSE],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
            trained.train_from_iterator(texts, trainer)
            with whole_folder(folder) as partial:
                PreTrainedTokenizerFast(
                    tokenizer_object=trained, eos_token=END, pad_token=END
                ).save_pretrained(str(partial))
        return folder

    def material(self) -> Material:
        """For records."""
        return Material(
            name=f"BPE of {self.vocabulary} ids",
            kind="tokenizer",
            licence="as the corpus",
            sha256=sha256_of(self._folder() / "tokenizer.json"),
            source=f"trained on {self.samples} template samples",
        )


@lru_cache(maxsize=4)
def _open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRows:
    """Samples packed into rows, for the runtime's loop."""

    parts: tuple[Instructions, ...]
    """Recipes whose samples are put together."""
    tokenizer: CodePairs
    held_out_tasks: int
    """Tasks of the grammar that make up the validation rows."""
    model: Model
    """Parallel model of the validation answers."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Training rows, in a seeded order."""
        samples = [sample for part in self.parts for sample in make_samples(part).samples]
        return self._stream(samples, sequence, seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """Held-out tasks with their right answers."""
        return self._stream(self.held_out_samples(), sequence, 0)

    def held_out_samples(self) -> list[InstructionSample]:
        """Programming instructions of held-out tasks, answered by the templates."""
        teacher = Templates()
        tasks = held_out(self.held_out_tasks, seed=0)
        return [teacher.teach(task, self.model, "programming") for task in tasks]

    def _stream(
        self, samples: Sequence[InstructionSample], sequence: int, seed: int
    ) -> TokenStream:
        return stream_of(
            samples,
            self.tokenizer.fast(),
            OURS,
            self.tokenizer.material(),
            sequence=sequence,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRows:
    """A file of samples under a published tokenizer, packed; the last tenth validates."""

    path: str
    """JSONL of samples."""
    sha256: str
    """Of the file, so that another file is another run."""
    tokenizer: str
    """Hub id or folder."""
    response: str
    """A special token of the tokenizer that ends prompts, such as `<|im_start|>`."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Nine tenths of the samples, in a seeded order."""
        return self._stream(sequence, seed, is_held_out=False)

    def validation(self, *, sequence: int) -> TokenStream:
        """Every tenth sample."""
        return self._stream(sequence, 0, is_held_out=True)

    def marks(self) -> Marks:
        """Ids of the two tokens.

        Raises:
            ValueError: where the tokenizer lacks one of them.
        """
        fast = _published(self.tokenizer)
        token = fast.convert_tokens_to_ids(self.response)
        if not isinstance(token, int) or token == fast.unk_token_id:
            raise ValueError(
                f"response={self.response!r} is no token of {self.tokenizer}; name one of "
                f"{', '.join(map(str, fast.all_special_tokens[:8]))}"
            )
        end = fast.eos_token_id
        if not isinstance(end, int):
            raise ValueError(
                f"{self.tokenizer} has no token that ends texts; set its eos_token, which ends every sample"
            )
        if end == token:
            raise ValueError(
                f"{self.tokenizer} ends texts with token {end}, which cannot also be {self.response!r}; "
                "name another response token"
            )
        return Marks(end=end, response=token)

    def _stream(self, sequence: int, seed: int, *, is_held_out: bool) -> TokenStream:
        samples = read_samples(Path(self.path))
        chosen = [
            sample for index, sample in enumerate(samples) if (index % 10 == 9) == is_held_out
        ]
        if not chosen:
            raise ValueError(f"{self.path} holds {len(samples)} samples; make at least 10")
        material = Material(
            name=self.tokenizer.rpartition("/")[2],
            kind="tokenizer",
            licence="as the model",
            sha256=digest(self),
            source="published",
        )
        return stream_of(
            chosen, _published(self.tokenizer), self.marks(), material, sequence=sequence, seed=seed
        )


@lru_cache(maxsize=2)
def _published(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def stream_of(
    samples: Sequence[InstructionSample],
    tokenizer: PreTrainedTokenizerFast,
    marks: Marks,
    material: Material,
    *,
    sequence: int,
    seed: int,
) -> TokenStream:
    """Packed rows of samples as the runtime's stream.

    Args:
        samples: at least one.
        tokenizer: of the model.
        marks: end and response.
        material: of the tokenizer, for records.
        sequence: targets per row.
        seed: of the rows' order.
    """
    tokens = packed(
        [encode(tokenizer, sample, marks) for sample in samples], row=sequence + 1, end=marks.end
    )
    flat = np.concatenate(tokens)
    ends = np.flatnonzero(flat == marks.end)
    content = json.dumps([sample.instruction + sample.answer for sample in samples]).encode()
    corpus = Material(
        name=f"{len(samples)} instruction samples",
        kind="corpus",
        licence=" and ".join(sorted({sample.provenance.licence for sample in samples})),
        sha256=hashlib.sha256(content).hexdigest(),
        source=" and ".join(sorted({sample.provenance.teacher for sample in samples})),
    )
    file = TokenFile(
        path=cache_folder(),
        tokens=flat,
        document_starts=np.concatenate([[0], ends[:-1] + 1]),
        vocabulary=len(tokenizer),
        materials=(corpus, material),
        characters=sum(len(sample.instruction) + len(sample.answer) for sample in samples),
    )
    starts = np.arange(len(tokens), dtype=np.int64) * (sequence + 1)
    return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=seed)


def encode(
    tokenizer: PreTrainedTokenizerFast, sample: InstructionSample, marks: Marks = OURS
) -> list[int]:
    """As the tokenizer begins every text; prompt, the response token, the answer and the end.

    Text that spells one of the tokenizer's control tokens is data, and gives its letters.
    """
    start = beginning(tokenizer)
    prompt = encoded(tokenizer, sample.instruction)
    answer = encoded(tokenizer, f"\n{sample.answer}")
    # Where texts begin and end with one token, a beginning would be the end of an empty sample.
    start = [] if marks.end in start else start
    return [*start, *prompt, marks.response, *answer, marks.end]


def packed(
    samples: Sequence[Sequence[int]], *, row: int, end: int = OURS.end
) -> list[Int[np.ndarray, " row"]]:
    """Rows of whole samples, first fit by descending length; the rest of a row is end tokens.

    Raises:
        ValueError: for a sample longer than a row, which cutting would spoil.
    """
    order = sorted(range(len(samples)), key=lambda index: (-len(samples[index]), index))
    rows: list[list[int]] = []
    for index in order:
        sample = samples[index]
        if len(sample) > row:
            raise ValueError(
                f"a sample has {len(sample)} tokens, a row {row}; use a sequence of {len(sample) - 1}"
            )
        place = next((tokens for tokens in rows if len(tokens) + len(sample) <= row), None)
        if place is None:
            rows.append(place := [])
        place.extend(sample)
    return [np.asarray(tokens + [end] * (row - len(tokens)), dtype=np.int64) for tokens in rows]


def sample_positions(
    tokens: Int[Tensor, "batch row"], marks: Marks = OURS
) -> tuple[Int[Tensor, "batch row"], Int[Tensor, "batch row"]]:
    """Of every token: which sample of its row it belongs to, and its place in that sample."""
    is_end = tokens == marks.end
    number = torch.cumsum(F.pad(is_end, (1, -1)).long(), dim=1)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.where(F.pad(is_end, (1, -1), value=True), places, 0).cummax(dim=1).values
    return number, places - starts


def is_answer(tokens: Int[Tensor, "batch row"], marks: Marks = OURS) -> Bool[Tensor, "batch row"]:
    """Tokens after a sample's response token, its end included; of padding, none."""
    # A token is of an answer if its own sample has a response token before it. Count those of the row before
    # each token, and take away those of earlier samples.
    number, _ = sample_positions(tokens, marks)
    last = int(number.max()) + 1
    before = torch.zeros(tokens.shape[0], last, dtype=torch.long, device=tokens.device)
    signs = (tokens == marks.response).long()
    before.scatter_add_(1, number, signs)
    seen = torch.cumsum(signs, dim=1) - signs
    earlier = torch.cumsum(before, dim=1) - before
    return (seen - earlier.gather(1, number)) > 0


def is_padding(tokens: Int[Tensor, "batch row"], marks: Marks = OURS) -> Bool[Tensor, "batch row"]:
    """End tokens that follow an end token."""
    is_end = tokens == marks.end
    return is_end & F.pad(is_end, (1, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionLoss:
    """Cross-entropy on answers, or on prompts as well, with packed samples blind to one another."""

    masked: bool
    """Whether prompts are left out of the loss."""
    also: TargetMask
    """Leaves out further targets, such as a goldfish mask."""
    marks: Marks = OURS

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The row shifted by one, `IGNORE` on padding, prompts and what `also` drops."""
        dropped = is_padding(batch.tokens, self.marks) | self.also.drop(
            batch.tokens, batch.document_ids
        )
        if self.masked:
            dropped = dropped | ~is_answer(batch.tokens, self.marks)
        return batch.tokens.masked_fill(dropped, IGNORE)[:, 1:]

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Summed over supervised targets."""
        logits = blind_logits(model, batch.tokens[:, :-1], self.marks)
        return MicrobatchLoss(nats_sum=token_nats(logits, targets, model).sum(), telemetry={})


def blind_logits(
    model: nn.Module, tokens: Int[Tensor, "batch token"], marks: Marks = OURS
) -> Float[Tensor, "batch token vocabulary"]:
    """Logits where each token sees only its own sample, whose positions begin at zero."""
    number, place = sample_positions(tokens, marks)
    same = number[:, :, None] == number[:, None, :]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    allowed = (same & causal.to(tokens.device))[:, None]
    mask = torch.zeros(allowed.shape, dtype=torch.float32, device=tokens.device)
    mask.masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return model(input_ids=tokens, position_ids=place, attention_mask=mask, use_cache=False).logits
