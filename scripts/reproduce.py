"""Reproduce the papers: `fourfold reproduce`, into the checkout's own `out/`.

scripts/env python scripts/reproduce.py
"""

import sys
from pathlib import Path

from fourfold_parallel import commands
from fourfold_parallel.reproduce import cli

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    named = any(word.partition("=")[0] == "--out" for word in sys.argv)
    out = () if named else ("--out", str(ROOT / "out"))
    cli.main("parallel", {"reproduce": commands.reproduce}, ["reproduce", *sys.argv[1:], *out])
