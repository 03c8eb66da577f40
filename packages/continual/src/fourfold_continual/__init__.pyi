from .curriculum import Curriculum as Curriculum
from .curriculum import go_on as go_on
from .curriculum import text_files as text_files
from .forgetting import Change as Change
from .forgetting import HeldOutLoss as HeldOutLoss
from .forgetting import annealed as annealed
from .forgetting import due_to_shift as due_to_shift
from .forgetting import forgot as forgot
from .forgetting import gained as gained
from .forgetting import replayed as replayed
from .forgetting import steps_for_equal_new as steps_for_equal_new
from .held_out import Sampled as Sampled
from .held_out import held_out_losses as held_out_losses
from .report import Report as Report
from .report import report_of as report_of
from .report import write_page as write_page

__version__: str
