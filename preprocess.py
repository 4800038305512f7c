"""Turns a corpus into a data set. Try: python preprocess.py --help"""

import sys

from tencentpretrain.entry.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
