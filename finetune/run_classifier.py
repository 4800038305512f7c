"""Fine-tunes a text classifier. Try: python finetune/run_classifier.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.finetune import main

if __name__ == "__main__":
    sys.exit(main("classifier"))
