"""`python -m fourfold_loki`: reproduce the paper, or try Loki on a model of yours.

python -m fourfold_loki --scale smoke
python -m fourfold_loki calibrate | rank | doctor | ppl | passkey | tasks | bench | autotune MODEL ...
"""

import sys

from fourfold_loki import commands
from fourfold_loki.reproduce.experiment import EXPERIMENT
from fourfold_parallel.reproduce import cli

if sys.argv[1:2] and sys.argv[1] in commands.COMMANDS:
    commands.main(sys.argv[1:])
else:
    cli.main(EXPERIMENT)
