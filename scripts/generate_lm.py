"""Continues prompts with a decoder-only model. Try: python scripts/generate_lm.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.generate_lm import main

if __name__ == "__main__":
    sys.exit(main())
