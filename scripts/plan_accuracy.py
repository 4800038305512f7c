"""Compares planned with measured peak memory. Try: python scripts/plan_accuracy.py --output results.json"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.plan_accuracy import main

if __name__ == "__main__":
    sys.exit(main())
