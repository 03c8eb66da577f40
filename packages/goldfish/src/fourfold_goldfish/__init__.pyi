from .canonical import CanonicalGoldfish as CanonicalGoldfish
from .canonical import Spelling as Spelling
from .corpus_audit import Audit as Audit
from .corpus_audit import audit as audit
from .cross_entropy import goldfish_cross_entropy as goldfish_cross_entropy
from .dropins.collators import add_goldfish as add_goldfish
from .dropins.collators import goldfish_collator as goldfish_collator
from .dropins.indexed import MaskedSamples as MaskedSamples
from .dropins.indexed import write_indexed as write_indexed
from .dropins.indexed import write_mask as write_mask
from .inputs import Texts as Texts
from .insertions import Cell as Cell
from .insertions import Insertions as Insertions
from .loss import Goldfish as Goldfish
from .memorization.extraction import Beam as Beam
from .memorization.extraction import Extraction as Extraction
from .memorization.extraction import Greedy as Greedy
from .memorization.extraction import Lookahead as Lookahead
from .memorization.extraction import Sampling as Sampling
from .memorization.extraction import extract as extract
from .memorization.extraction import rouge_l as rouge_l
from .memorization.near_verbatim import Bounds as Bounds
from .memorization.near_verbatim import near_verbatim as near_verbatim
from .memorization.recital import Attacker as Attacker
from .memorization.report import recital_report as recital_report
from .objective import CompactedNextToken as CompactedNextToken

__version__: str
