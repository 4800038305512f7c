"""`python -m tencentpretrain` is the console command."""

from __future__ import annotations

import sys

from tencentpretrain.entry.main import main

if __name__ == "__main__":
    sys.exit(main())
