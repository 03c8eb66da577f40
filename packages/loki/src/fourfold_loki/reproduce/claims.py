"""What the paper says, its number, and the rule that judges our records.

Numbers of the paper's tables are quoted only where its abstract, captions or text could be read; the others
are named, not quoted.
"""

from fourfold_loki.reproduce import measures as rules
from fourfold_parallel.reproduce.claims import Claim

_MODEL = "SmolLM2-135M (4-bit weights), 9 query and 3 key/value heads of 64; Wikipedia, windows of 512 tokens"
_LONG = (
    "SmolLM2-135M (4-bit weights); 16 other windows of Wikipedia, of 2,048 tokens; the last 512 are sparse "
    "and keep 512 keys"
)
_NOT_HERE = "a model that is above chance on these tasks (1 B parameters and more), a GPU"

CLAIMS = (
    Claim(
        id="C1",
        section="3, figure 1",
        statement="Keys are low-rank: few principal directions hold 90 % of their variance",
        paper_value="about 80 of 128, mean over layers and heads, six model families",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of rank at 90 % over head width (after rotary) "
        "lies below 0.75; contradicted if above 0.9",
        rule=rules.low_rank,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C2",
        section="3, figure 2",
        statement="The first layers need fewest directions",
        paper_value="curves by layer",
        conditions=_MODEL,
        rule_text="reproduced if the first layer's rank before rotary lies below the interval of the other "
        "layers; contradicted if above",
        rule=rules.first_layers,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C3",
        section="3",
        statement="Keys have lower rank before the rotary embedding than after",
        paper_value="bars by model",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of the difference lies below 0; contradicted if "
        "above",
        rule=rules.before_is_lower,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C4",
        section="3",
        statement="Directions carry over between corpora",
        paper_value="overlapping curves for three corpora",
        conditions=_MODEL + ", and CPython's manual",
        rule_text="reproduced if, with 16 directions fitted on the other corpus, the interval over layers of "
        "the relative loss of captured variance lies below 0.05; contradicted if above 0.1",
        rule=rules.transfers,
        scales=("laptop",),
        needs="the laptop scale, which calibrates on two corpora",
    ),
    Claim(
        id="C5",
        section="5, table 2",
        statement="Perplexity stays near full attention's at a quarter of keys and coordinates",
        paper_value="a table (Llama-2, Llama-3, Mistral); its values could not be verified",
        conditions=_MODEL + "; centred PCA as published",
        rule_text="reproduced if the interval over windows of added perplexity lies below 5 %; contradicted "
        "if above 5 %",
        rule=rules.costs("loki-pca", below=5, above=5),
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C5b",
        section="5, table 2",
        statement="At an equal budget Loki is better than H2O",
        paper_value="the same table",
        conditions=_MODEL + "; centred PCA as published",
        rule_text="reproduced if the interval over windows of Loki's loss less H2O's lies below 0; "
        "contradicted if above",
        rule=rules.beats_eviction("loki-pca", "loki-pca-uncentred"),
        scales=("laptop",),
        needs="the laptop scale, which runs H2O",
    ),
    Claim(
        id="C6",
        section="5, figures 3 and 4",
        statement="Which transform is best, before or after rotary, depends on the model",
        paper_value="bars by model",
        conditions=_MODEL + "; one model",
        rule_text="reproduced if the two differ: the interval over windows of the difference leaves out 0; "
        "otherwise inconclusive",
        rule=rules.depends,
        scales=("laptop",),
        needs="the laptop scale, which runs both",
    ),
    Claim(
        id="C7",
        section="5",
        statement="Downstream tasks are nearly unchanged",
        paper_value="six tasks, eight models; values could not be verified",
        conditions="not run: a model of 135 M parameters is near chance on them",
        rule_text="no rule at this scale",
        rule=rules.untested,
        scales=(),
        needs=_NOT_HERE,
    ),
    Claim(
        id="C8",
        section="5, figures 6 and 7",
        statement="LongBench scores stay close",
        paper_value="a trade-off curve",
        conditions="not run",
        rule_text="no rule at this scale",
        rule=rules.untested,
        scales=(),
        needs=_NOT_HERE,
    ),
    Claim(
        id="C9",
        section="appendix",
        statement="Attending with the approximate scores themselves (PCAAttn) is poor",
        paper_value="a table",
        conditions=_MODEL + "; half of the coordinates of the published basis",
        rule_text="reproduced if the interval over windows of added perplexity lies above 20 %; "
        "contradicted if below 5 %",
        rule=rules.poor,
        scales=("laptop",),
        needs="the laptop scale, which runs it",
    ),
    Claim(
        id="C10",
        section="6",
        statement="Attention is up to 45 % faster than the library's own",
        paper_value="up to 45 % less time than eager attention (Llama-2-13B, prompts near 3,500)",
        conditions="attention of one layer for one token on a CPU, one thread, SmolLM2's heads, float32; a "
        "quarter of the keys in pages of 16; no GPU",
        rule_text="reproduced if, at the longest context, the interval over rounds of the time saved "
        "against the library's own attention lies above 0; contradicted if below",
        rule=rules.saves_time,
        scales=("laptop",),
        needs="the laptop scale, which times a CPU; the paper's number needs a GPU of 80 GB",
    ),
    Claim(
        id="C11",
        section="appendix",
        statement="Approximate and exact top-k keys agree well",
        paper_value="a plot",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of recall at a quarter of keys and coordinates "
        "lies above 0.7; contradicted if below",
        rule=rules.agrees,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C12",
        section="4.2",
        statement="Loki reads d/(2D) + k_f of what dense attention reads",
        paper_value="speed-up bound 1/(d_f/2 + k_f): 2.67 at a quarter each",
        conditions=_MODEL + "; selection shared by the query heads of a key/value head",
        rule_text="reproduced if the counted share is within 10 % of the formula; contradicted otherwise",
        rule=rules.predicted_reads,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="F1",
        section="ours",
        statement="Centred PCA, as published, drops the attention sink and fails on this model",
        paper_value="not in the paper",
        conditions=_MODEL,
        rule_text="reproduced if the interval over windows of added perplexity lies above 20 %; "
        "contradicted if below",
        rule=rules.fails(),
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="F2",
        section="ours",
        statement="A basis that looks at queries too repairs it, without keeping sinks by force",
        paper_value="not in the paper",
        conditions=_MODEL + "; balanced basis, per query head",
        rule_text="reproduced if the interval over windows of added perplexity lies below 1.5 %; "
        "contradicted if above",
        rule=rules.costs("loki-balanced", below=1.5, above=1.5),
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="F1b",
        section="ours",
        statement="F1 at four times the context",
        paper_value="not in the paper",
        conditions=_LONG,
        rule_text="as F1: reproduced if the interval over windows of added perplexity lies above 20 %; "
        "contradicted if below",
        rule=rules.fails("long-context"),
        scales=("laptop",),
        needs="the laptop scale, which runs long windows",
    ),
    Claim(
        id="F2b",
        section="ours",
        statement="F2 at four times the context",
        paper_value="not in the paper",
        conditions=_LONG + "; balanced basis, per query head",
        rule_text="as F2: reproduced if the interval over windows of added perplexity lies below 1.5 %; "
        "contradicted if above",
        rule=rules.costs("loki-balanced", below=1.5, above=1.5, stage="long-context"),
        scales=("laptop",),
        needs="the laptop scale, which runs long windows",
    ),
    Claim(
        id="F2c",
        section="ours",
        statement="With that basis Loki is better than H2O at an equal budget, at four times the context",
        paper_value="not in the paper",
        conditions=_LONG + "; balanced basis, per query head",
        rule_text="as C5b: reproduced if the interval over windows of Loki's loss less H2O's lies below 0; "
        "contradicted if above",
        rule=rules.beats_eviction("loki-balanced", "loki-pca", stage="long-context"),
        scales=("laptop",),
        needs="the laptop scale, which runs long windows",
    ),
    Claim(
        id="F3",
        section="ours",
        statement="A quarter of the keys, chosen by Loki, holds a passkey at any depth; the last quarter "
        "does not",
        paper_value="not in the paper, which shows LongBench",
        conditions="SmolLM2-135M (4-bit weights); windows of 1,024 tokens of Wikipedia, five depths, two "
        "numbers each; teacher-forced greedy decoding",
        rule_text="reproduced if full attention finds at least half, Loki (balanced, shared) at least nine "
        "tenths of those, and StreamingLLM at most half of those; contradicted if Loki finds less than half",
        rule=rules.finds_passkeys,
        scales=("laptop",),
        needs="the laptop scale, which hides passkeys",
    ),
)
