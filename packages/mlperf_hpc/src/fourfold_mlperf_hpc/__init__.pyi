from .decomposition import Attempt as Attempt
from .decomposition import BatchLaw as BatchLaw
from .decomposition import Factors as Factors
from .decomposition import batch_law as batch_law
from .decomposition import bootstrap as bootstrap
from .decomposition import counted as counted
from .decomposition import expected as expected
from .decomposition import factors as factors
from .decomposition import score_s as score_s
from .mllog import RULES as RULES
from .mllog import Submitter as Submitter
from .mllog import lines as lines
from .published import Submission as Submission
from .published import submission_of as submission_of
from .published import submissions as submissions
from .roofline import Roofline as Roofline
from .roofline import roofline_of as roofline_of
from .trainings import attempt_of as attempt_of
from .trainings import attempts_in as attempts_in

__version__: str
