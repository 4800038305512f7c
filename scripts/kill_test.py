"""Shows that killed runs end as if they had been left alone. Try: python scripts/kill_test.py --kills 20"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.kill_test import main

if __name__ == "__main__":
    sys.exit(main())
