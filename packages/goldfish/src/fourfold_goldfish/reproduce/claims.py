"""What the papers claim, and the rules in words; `rules.py` has them as functions of records."""

from fourfold_goldfish.reproduce import measures as rules
from fourfold_parallel.reproduce.claims import Claim

_MINIATURE = (
    "smoke: 0.5 M parameters, 16 Wikipedia passages of 65 tokens seen 40 times in one pass, prompt 49, "
    "16 to recite; laptop: 0.8 M parameters, 32 passages of 97 tokens seen 48 times, 24 to recite; "
    "ordered hash, exclusive window; 3 seeds"
)
_STUDY = (
    "five models of 0.1 to 1.1 M parameters, buckets of 8 Wikipedia passages of 65 tokens seen 0, 1, 4, 6, "
    "16, 24, 36 and 64 times in one pass, 16 tokens to recite; 3 seeds"
)
_FINETUNED = (
    "SmolLM2-135M (4-bit weights dequantized), its last 10 of 30 blocks trained for 8 passes over 6 "
    "Wikipedia passages of 65 tokens, 24 to recite; 3 seeds of 6 passages each"
)


CLAIMS = (
    Claim(
        id="G1",
        section="4.1",
        statement="With plain loss, passages that recur are recited verbatim",
        paper_value="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share recited lies above 0.5 and above the "
        "unseen passages' interval; otherwise inconclusive, since there is nothing to prevent",
        rule=rules.recites("plain"),
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G2",
        section="4.1",
        statement="With goldfish loss (k=4), none is",
        paper_value="0 of 100, same setting",
        conditions=_MINIATURE,
        rule_text="reproduced if G1 holds and the share recited lies inside the control's 95 % interval; "
        "contradicted if it lies above",
        rule=rules.does_not("plain", "k4"),
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G3",
        section="4.2",
        statement="With goldfish loss, overlap with the true continuation is near that of unseen text",
        paper_value="ROUGE-L near the control's for k=3, 4 (TinyLlama-1.1B, 20 B tokens, 50 repeats)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % intervals over seeds of mean ROUGE-L overlap; contradicted if "
        "goldfish's lies above the control's",
        rule=rules.rouge_at_control,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G4",
        section="4.4",
        statement="Continuations leave their passage at the targets that were left out",
        paper_value="most first divergences fall on dropped tokens",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share lies above 0.5; contradicted if below",
        rule=rules.diverges_on_dropped,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G5",
        section="4.2",
        statement="Recital falls from plain loss's level to the control's as k falls",
        paper_value="curves over k = 3 to 128; no law is given, ours is (1 - 1/k)^n",
        conditions="0.8 M parameters, 32 passages of 97 tokens seen 48 times, n = 24 to recite, 3 seeds",
        rule_text="reproduced if, for k = 2, 4, 8 and 32, (1 - 1/k)^24 lies inside the 95 % interval of "
        "the share recited; contradicted otherwise",
        rule=rules.recall_by_k,
        scales=("laptop",),
        needs="the laptop scale, which sweeps k",
    ),
    Claim(
        id="G6",
        section="3",
        statement="Gaps must be the same at each repetition: random ones are filled",
        paper_value="the reason for hashing; no number",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share recited with random gaps (one in 4) lies "
        "above that with goldfish's (k=4); contradicted otherwise",
        rule=rules.gaps_must_stay,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G7",
        section="6.2",
        statement="30 beams recite no passage either",
        paper_value="k = 3, 4 resist, larger k less (values not recoverable from the text we have)",
        conditions=_MINIATURE,
        rule_text="reproduced if the share recited by beam search (k=4) lies inside the control's 95 % "
        "interval; contradicted if above",
        rule=rules.beams_fail,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G8",
        section="6.1",
        statement="Membership can still be inferred",
        paper_value="weakened, not prevented (loss and zlib criteria)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval over seeds of the loss criterion's AUC (k=4) lies above "
        "0.5; contradicted if below",
        rule=rules.membership_survives,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G9",
        section="5.2",
        statement="Validation loss is that of plain loss on as many supervised tokens",
        paper_value="curves coincide (TinyLlama-1.1B, 20 B tokens, k=4)",
        conditions="0.5 M parameters, 96 steps of 16 rows of 64 tokens without repetition, goldfish k=2 "
        "against plain loss with batches of 8; 3 seeds",
        rule_text="reproduced if the 95 % interval over seeds of the gap holds 0 or the mean gap is at most "
        "0.03 nats; contradicted otherwise",
        rule=rules.equal_at_equal_supervision,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G10",
        section="5.1",
        statement="Benchmarks are not affected",
        paper_value="little to no impact on zero-shot suites (TinyLlama-1.1B)",
        conditions="none: a model of 1 M parameters is at chance on every one",
        rule_text="the difference's 95 % interval holds 0",
        rule=rules.not_run,
        scales=(),
        needs="a model that is above chance: about 1 B parameters and 20 B tokens, a node of GPUs",
    ),
    Claim(
        id="G11",
        section="limitations",
        statement="Near-duplicates undo the published hash, and not one of letters and digits",
        paper_value="named as a limitation; no number, and the second half is ours",
        conditions="the first 3,000 characters of 60 Wikipedia articles, wrapped at 72 columns and then "
        "not, k=4",
        rule_text="reproduced if the re-wrapped copy teaches more than 0.5 of the tokens that the published "
        "hash hides and less than 0.05 of those that a hash of 24 canonical characters hides; contradicted "
        "if the second share is larger; inconclusive if the first is smaller",
        rule=rules.near_duplicates,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="A1",
        section="AxoNN, memorisation",
        statement="Larger models memorise in fewer passes",
        paper_value="70 B and 405 B recite after few passes, 1 B to 13 B hardly after six",
        conditions=_STUDY,
        rule_text="passes needed is the fewest repetitions at which half of a bucket is recited, pooled over "
        "seeds; reproduced if it never grows with size and the largest model needs fewer than the "
        "smallest; contradicted if it grows; inconclusive if all are equal",
        rule=rules.larger_need_fewer,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="A2",
        section="AxoNN, memorisation",
        statement="With goldfish loss (k=2) every bucket stays at the control's level",
        paper_value="all buckets fall to the control's (405 B)",
        conditions=_STUDY,
        rule_text="reproduced if, in the largest model, the share of every trained bucket lies inside the "
        "control's 95 % interval while plain loss is above it at 64 passes; contradicted if one lies above",
        rule=rules.study_goldfish,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="A3",
        section="AxoNN, memorisation",
        statement="The largest models memorise in a single pass",
        paper_value="405 B recites pages seen once",
        conditions="none: our models need tens of passes",
        rule_text="the share recited after one pass lies above the control's 95 % interval",
        rule=rules.not_run,
        scales=(),
        needs="a model of 70 B parameters or more, and a cluster",
    ),
    Claim(
        id="S1",
        section="4.1",
        statement="A pretrained model recites what it is fine-tuned on repeatedly",
        paper_value="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
        conditions=_FINETUNED,
        rule_text="as G1",
        rule=rules.recites("smollm2-plain"),
        scales=("laptop",),
        needs="the laptop scale, which fine-tunes SmolLM2-135M",
    ),
    Claim(
        id="S2",
        section="4.1",
        statement="With goldfish loss (k=4) it does not",
        paper_value="0 of 100, same setting",
        conditions=_FINETUNED,
        rule_text="as G2",
        rule=rules.does_not("smollm2-plain", "smollm2-k4"),
        scales=("laptop",),
        needs="the laptop scale, which fine-tunes SmolLM2-135M",
    ),
)
