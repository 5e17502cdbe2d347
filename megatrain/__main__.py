"""`python -m megatrain` is the same as the `megatrain` command."""

from megatrain.cli import command

if __name__ == "__main__":
    command()
