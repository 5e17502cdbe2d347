#!/usr/bin/env bash
# Installs megatrain into .venv (the first time) and runs the tests, tier by tier:
#
#   bash tools/test.sh               unit, e2e and parity on up to two ranks, without what compiles for long: at
#                                    most 15 minutes on two cores
#   bash tools/test.sh --all         everything, with chaos and slurm: about 35 minutes on two cores
#   bash tools/test.sh --coverage    the unit tests, and how much of each room they cover: a third slower
#   bash tools/test.sh ARGUMENTS     pytest with these arguments, such as tests/unit/data or -k resume
#
# Exits with 1 if a test failed or a tier ran no test. The last line sums the tiers up in pytest's own form.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
pytest=(.venv/bin/python -m pytest)

tiers=(unit parity e2e)
daily=(-m "not combination and not slow_build")
coverage=()
slurm=no
if [ "${1:-}" = --all ] && [ $# -eq 1 ]; then
  tiers+=(chaos)
  slurm=yes
  daily=()
elif [ "${1:-}" = --coverage ] && [ $# -eq 1 ]; then
  tiers=(unit)
  coverage=(--cov=megatrain --cov=kernels --cov-report=)
elif [ $# -gt 0 ]; then
  exec "${pytest[@]}" "$@"
fi

# A process per core. Tests of one group share one (tests/conftest.py). The tests on Slurm share a cluster.
parallel=(-n logical --maxprocesses 8 --dist loadgroup)

folder=$(mktemp -d) # of each tier, what pytest printed and the line that sums it up
trap 'rm -rf "$folder"' EXIT
failed=0

run_tier() {
  local tier=$1 start=$SECONDS result=passed
  shift
  echo "== $tier"
  "${pytest[@]}" --tb=short "tests/$tier" "$@" 2>&1 | tee "$folder/$tier.log" || result=FAILED
  printf '%-8s %-6s %5d s\n' "$tier" "$result" $((SECONDS - start)) >"$folder/$tier.result"
}

for tier in "${tiers[@]}"; do
  case $tier in
    parity) run_tier parity "${parallel[@]}" "${daily[@]}" ;;
    unit)
      # the tests on Slurm run one at a time and mostly wait
      [ "$slurm" = no ] || run_tier slurm &>"$folder/slurm.shown" &
      run_tier unit "${parallel[@]}" "${coverage[@]}"
      wait
      [ "$slurm" = no ] || cat "$folder/slurm.shown"
      ;;
    *) run_tier "$tier" "${parallel[@]}" ;;
  esac
done

echo
[ ${#coverage[@]} -eq 0 ] || .venv/bin/python tools/coverage_by_room.py || failed=1
cat "$folder"/*.result
! grep -q FAILED "$folder"/*.result || failed=1
[ "$slurm" = no ] || [ -s "$folder/slurm.result" ] || failed=1
cat "$folder"/*.log >"$folder/all"
.venv/bin/python - "$folder/all" "$SECONDS" <<'SUM'
import re, sys
from collections import Counter

totals = Counter()
for line in open(sys.argv[1], errors="replace"):
    if re.fullmatch(r"=+ .* in [\d.]+s( \([\d:]+\))? =+", line.strip()):  # a tier's closing line
        for count, outcome in re.findall(r"(\d+) (failed|passed|skipped|xfailed|xpassed|error)", line):
            totals[outcome] += int(count)
words = [f"{totals[o]} {o}" for o in ("failed", "passed", "skipped", "xfailed", "xpassed", "error") if totals[o]]
print(f" {', '.join(words) or 'no tests ran'} in {sys.argv[2]}.00s ".center(80, "="))
SUM
exit "$failed"
