#!/usr/bin/env bash
# Everything that one GPU can tell, in under ten minutes; a table against the goals comes last.
#     bash tools/bench/gpu_suite.sh [--json FILE]
#     bash tools/bench/gpu_suite.sh --small      # the same at toy sizes on the CPU, to see that it works
# PYTHON names the interpreter (default: .venv/bin/python of the checkout where there is one, else python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "$python" tools/bench/gpu_suite.py "$@"
