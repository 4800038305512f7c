"""Compares this package with recorded numbers. Try: python scripts/check_parity.py ../shared/parity/models"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.check_parity import main

if __name__ == "__main__":
    sys.exit(main())
