"""The `megatrain` command; `python -m megatrain` is the same."""

import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C during its imports ends it as any other does."""
    try:
        if __name__ == "__main__":
            from megatrain.distributed.python_process import drop_working_directory

            drop_working_directory(os.path.dirname(os.path.abspath(__file__)))
        from megatrain.cli import command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("megatrain: interrupted\n")
        sys.stderr.flush()
        os._exit(130)  # EXIT_INTERRUPTED; at once, as a second Ctrl-C would interrupt the interpreter's shutdown


if __name__ == "__main__":
    main()
