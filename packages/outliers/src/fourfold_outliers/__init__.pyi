from .disabling import averaged as averaged
from .disabling import masked as masked
from .disabling import matched_sets as matched_sets
from .disabling import norms_of as norms_of
from .disabling import random_sets as random_sets
from .disabling import removed as removed
from .disabling import silenced as silenced
from .effects import behaviour as behaviour
from .frequency import Occurrences as Occurrences
from .frequency import Types as Types
from .frequency import linked as linked
from .geometry import Sums as Sums
from .geometry import by_parameter as by_parameter
from .geometry import by_share as by_share
from .geometry import by_variance as by_variance
from .geometry import lasting as lasting
from .report import Report as Report
from .report import outlier_report as outlier_report
from .rotation import random_rotation as random_rotation
from .rotation import rotate as rotate
from .stream import Documents as Documents
from .stream import documents as documents
from .stream import looking as looking
from .stream import measure as measure
from .telemetry import Outliers as Outliers

__version__: str
