"""Injects faults and prints what was promised and what was reached. Try: python scripts/reliability.py --rows R1 R3"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.reliability import main

if __name__ == "__main__":
    sys.exit(main())
