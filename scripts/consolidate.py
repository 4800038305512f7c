"""Joins a checkpoint in many files into one. Try: python scripts/consolidate.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.consolidate import main

if __name__ == "__main__":
    sys.exit(main())
