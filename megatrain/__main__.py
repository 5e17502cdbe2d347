"""`python -m megatrain` is the same as the `megatrain` command."""

import os

from megatrain.distributed.python_process import drop_working_directory

if __name__ == "__main__":
    drop_working_directory(os.path.dirname(os.path.abspath(__file__)))
    from megatrain.cli import command

    command()
