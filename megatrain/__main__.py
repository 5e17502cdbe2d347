"""`python -m megatrain` is the same as the `megatrain` command."""

import sys

from megatrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
