"""Shows each setting of a run and where it comes from. Try: python scripts/explain_config.py --help"""

import sys

from tencentpretrain.entry.explain_config import main

if __name__ == "__main__":
    sys.exit(main())
