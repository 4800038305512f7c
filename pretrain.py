"""Pre-trains a model. Try: python pretrain.py --help"""

import sys

from tencentpretrain.entry.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
