"""Makes a vocabulary from a corpus. Try: python scripts/build_vocab.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.build_vocab import main

if __name__ == "__main__":
    sys.exit(main())
