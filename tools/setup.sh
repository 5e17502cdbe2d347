# Makes .venv and installs the project into it. Sourced by test.sh and quickstart.sh.
# If .venv is up to date, it installs nothing. It does not install into a .venv that is a symbolic link.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "megatrain: error: no Python 3.10 to 3.13 found (tried python3 and python3.10 to python3.13)" >&2
  exit 8
}

make_environment() {
  local python
  python=$(find_python)
  echo "making .venv with $("$python" --version)"
  if ! "$python" -m venv .venv >/dev/null; then
    rm -rf .venv
    echo "megatrain: error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 8
  fi
}

# What pip is doing: the package it collects or builds, then how many are installed.
current_stage() {
  local log=$1 stage all installed
  stage=$(grep -oE '^(Collecting|Building wheels? for|Installing collected packages:) .*' "$log" | tail -n 1 || true)
  case $stage in
    Installing*)
      all=$(echo "$stage" | tr ',' '\n' | wc -l)
      installed=$(find .venv/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
      echo "installing, $((installed < all ? installed : all)) of $all packages"
      ;;
    "") echo "preparing" ;;
    *) echo "$stage" | sed 's/ (from .*//' | cut -c 1-70 ;;
  esac
}

# One line that moves on a terminal, a line every half minute elsewhere; the whole of pip's output is in the log.
show_progress() {
  local pid=$1 log=$2 start=$SECONDS
  while kill -0 "$pid" 2>/dev/null; do
    local now="$((SECONDS - start)) s: $(current_stage "$log")"
    if [ -t 1 ]; then
      printf '\r\033[K%s' "$now"
    elif (((SECONDS - start) % 30 == 0)); then
      echo "$now"
    fi
    sleep 1
  done
  [ -t 1 ] && printf '\r\033[K'
  echo "pip ended after $((SECONDS - start)) s"
}

install() {
  local log=.venv/install.log pid
  echo "installing megatrain with all extras, tests and documentation included, into .venv: 3.3 GB with torch for CPUs," \
    "more with torch for CUDA. It takes two minutes or more, depending on the network. Log: $log"
  .venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[data,corpus,hf,tune,evaluate,compress,serve,test,docs]' >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
  show_progress "$pid" "$log"
  trap - INT TERM
  if ! wait "$pid"; then
    tail -n 30 "$log" >&2
    echo "megatrain: error: the installation failed; the whole log is $log" >&2
    exit 8
  fi
}

# An editable install belongs to one checkout: into another one's environment, it would make that run this code.
refuse_link() {
  [ -L .venv ] || return 0
  echo "megatrain: error: .venv is a link to $(readlink .venv), which does not hold an up-to-date installation of" \
    "$PWD; nothing was changed. Remove the link (rm .venv) and run this again: it then makes a .venv here" >&2
  exit 8
}

stamp="$(cat pyproject.toml constraints.txt | cksum) $PWD"
if ! .venv/bin/python -c '' 2>/dev/null; then
  refuse_link
  make_environment
fi
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$stamp" ]; then
  refuse_link
  install
  echo "$stamp" >.venv/installed
fi
