#!/usr/bin/env bash
# Installs megatrain into .venv (the first time) and makes an assistant at toy size: from made-up text to a chat page.
# Started again, it goes on where it was. Arguments go to tools/assistant.py.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python tools/assistant.py "$@"
