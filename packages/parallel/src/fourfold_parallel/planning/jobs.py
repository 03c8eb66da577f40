"""Names that a person types, as the planner's values."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from fourfold_parallel.common.files import StrPath
from fourfold_parallel.plan.job import Layout
from fourfold_parallel.plan.transformer import Transformer


def config_of(model: StrPath) -> PretrainedConfig:
    """The configuration of a hub id, a folder, or a `config.json`; no weights are read.

    Raises:
        ValueError: There is none, or the file is no configuration.
    """
    path = Path(model)
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"{path} is no file; name a config.json, a folder or a hub id")
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.pop("model_type", None) if isinstance(fields, dict) else None
        if kind is None:
            raise ValueError(
                f"{path} lacks model_type, which says what model it is; transformers' config.json has it"
            )
        return AutoConfig.for_model(kind, **fields)
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"no configuration of {str(model)!r} was found (a hub needs a network): name a folder with "
            "config.json, or the file"
        ) from error


def transformer_of(model: StrPath) -> Transformer:
    """The sizes of a model by hub id, folder or `config.json`."""
    return Transformer.of(config_of(model))


def layout_of(text: str) -> Layout:
    """A grid from words such as `data=2,row=4`.

    Raises:
        ValueError: A word is not an axis with a size.
    """
    sizes = {"data": 1, "depth": 1, "row": 1, "col": 1}
    for word in filter(None, re.split(r"[,\s]+", text)):
        name, _, size = word.partition("=")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"{word!r} is no axis with a size; write data=2,depth=1,row=4,col=1 (missing ones are 1)"
            )
        sizes[name] = int(size)
    return Layout(data=sizes["data"], depth=sizes["depth"], row=sizes["row"], col=sizes["col"])
