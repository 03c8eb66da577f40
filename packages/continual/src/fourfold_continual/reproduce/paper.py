"""The paper's own curriculum as a value, and how it is launched.

Six languages and code are data sets of the hub, at commits that you name. Sizes and steps are the published
ones: 2,048 rows of 2,048 tokens, 90,000 steps (CAP), then 14,000 on cleaner text (CAT).
"""

from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.run.data import TokenSource
from fourfold_parallel.run.mixtures import Mixed, MixturePart, MixtureStage, Staged

STEPS = (90_000, 14_000)
"""Of the two stages."""


def aurora_m(sources: dict[str, TokenSource], shares: tuple[dict[str, float], ...]) -> Staged:
    """The two stages over sources by name (`Packed(corpus=Hub(...), ...)`), one tokenizer for all.

    Args:
        sources: of each language, of code and of instructions.
        shares: of each source in the two stages; the paper gives them as figures, not as numbers.
    """
    return Staged(
        stages=tuple(
            MixtureStage(
                mixture=Mixed(
                    parts=tuple(
                        MixturePart(name=name, source=source, weight=share.get(name, 0.0))
                        for name, source in sources.items()
                    )
                ),
                steps=steps,
            )
            for share, steps in zip(shares, STEPS, strict=True)
        )
    )


def launches() -> list[Launch]:
    """Going on with a model of the hub, with replay, at three sizes."""
    lines = (
        (
            "smollm2-code",
            "SmolLM2-135M on code with 5 % replay",
            "HuggingFaceTB/SmolLM2-135M",
            1,
            1,
            0.5,
        ),
        (
            "starcoderbase-1b",
            "StarCoderBase-1B on your text",
            "bigcode/starcoderbase-1b",
            1,
            8,
            24.0,
        ),
        ("aurora-m", "StarCoderPlus (15.5 B), as Aurora-M", "bigcode/starcoderplus", 32, 8, 1152.0),
    )
    return [
        Launch(
            name=name,
            title=title,
            needs=f"{nodes * gpus} GPUs, {model}, and texts of yours in old/ and new/",
            command=f"-m fourfold_continual train {model} --old old/ --new new/ --replay 0.05 --out {name}",
            nodes=nodes,
            gpus=gpus,
            hours=hours,
        )
        for name, title, model, nodes, gpus, hours in lines
    ]
