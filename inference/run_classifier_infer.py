"""Predicts with a fine-tuned text classifier. Try: python inference/run_classifier_infer.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tencentpretrain.entry.infer import main

if __name__ == "__main__":
    sys.exit(main("classifier"))
