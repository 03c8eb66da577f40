"""Files beside a checkpoint's weights that make it a folder that plain `from_pretrained` reads."""

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from fourfold_parallel.run.data import TokenFile

log = logging.getLogger(__name__)


def files(model: nn.Module, tokens: TokenFile) -> dict[str, bytes]:
    """Configuration, generation settings and tokenizer: `AutoModelForCausalLM` and `AutoTokenizer` read them.

    They are made before the first step, so that what cannot be written is known before it.

    Args:
        model: the plain model, before an engine lays it out.
        tokens: what it is trained on; the tokenizer that made them lies beside them, unless they are a
            package's own.

    Returns:
        Content by file name. None for a model that `from_pretrained` could not read, which is logged.
    """
    reason = _unreadable(model)
    if reason:
        log.warning(
            "the checkpoints hold weights without a configuration, since %s; "
            "trained_model(run, checkpoint) reads them",
            reason,
        )
        return {}
    assert isinstance(model, PreTrainedModel)
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        if model.generation_config is not None:
            settings = copy.deepcopy(model.generation_config)
            settings.use_cache = True  # training goes without one, generation need not
            # Published settings may be such as `save_pretrained` refuses; they are kept as they are.
            settings.to_json_file(folder / "generation_config.json")
        if tokens.has_tokenizer:
            tokens.tokenizer().tokenizer.save_pretrained(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _unreadable(model: nn.Module) -> str:
    """The reason for which no `from_pretrained` could read the weights; empty where it can."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"{kind} is not a model of transformers"
    if getattr(model, "peft_config", None):
        return f"{kind} holds low-rank adapters"
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind} is not registered with AutoModelForCausalLM"
    return ""
