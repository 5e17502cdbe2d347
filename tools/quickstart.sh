#!/usr/bin/env bash
# Installs megatrain into .venv (the first time) and trains a small GPT on real text. Arguments go to tools/quickstart.py.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python tools/quickstart.py "$@"
