"""Compares every layout of processes with one process. Try: python scripts/distributed_table.py --layouts DDP"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.distributed_table import main

if __name__ == "__main__":
    sys.exit(main())
