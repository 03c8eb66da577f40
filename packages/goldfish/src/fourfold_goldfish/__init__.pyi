from .canonical import CanonicalGoldfish as CanonicalGoldfish
from .canonical import Spelling as Spelling
from .collators import add_goldfish as add_goldfish
from .collators import goldfish_collator as goldfish_collator
from .corpus_audit import Audit as Audit
from .corpus_audit import audit as audit
from .cross_entropy import goldfish_cross_entropy as goldfish_cross_entropy
from .inputs import Texts as Texts
from .loss import Goldfish as Goldfish
from .memorization import Beam as Beam
from .memorization import Extraction as Extraction
from .memorization import Greedy as Greedy
from .memorization import Lookahead as Lookahead
from .memorization import Sampling as Sampling
from .memorization import extract as extract
from .memorization import rouge_l as rouge_l
from .objective import CompactedNextToken as CompactedNextToken

__version__: str
