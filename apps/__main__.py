"""`python -m apps` in the checkout, `python -m redrafter_mlx.apps` installed."""

import redrafter_mlx  # first, for Ctrl-C during the imports  # noqa: F401

# isort: split
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
