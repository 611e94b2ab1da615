"""`python -m apps` in the checkout, `python -m redrafter_mlx.apps` installed."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
