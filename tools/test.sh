#!/usr/bin/env bash
# Installs megatrain into .venv (the first time) and runs the tests. Arguments go to pytest: bash tools/test.sh tests/unit

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python -m pytest "$@"
