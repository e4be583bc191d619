#!/usr/bin/env bash
# Pin jaxscale[dev] and everything below it, one file per Python minor: requirements/py311.txt, ...
#
#   bash scripts/lock.sh             keep the pins that stand; add and drop what pyproject.toml asks
#   bash scripts/lock.sh --upgrade   take the newest versions that fit together
#
# A minor version that this machine lacks is skipped by name. The resolver is pip's own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

write_lock() {
  local python="$1" minor="$2" lock="$ROOT/requirements/py${2/./}.txt" report pins=/dev/null
  report="$(mktemp)"
  if [[ -f "$lock" && "${UPGRADE:-}" != yes ]]; then
    pins="$lock"
  fi
  "$python" -m pip install --dry-run --ignore-installed --quiet --quiet --report "$report" \
    --constraint "$pins" "${ROOT}[dev]"
  "$python" - "$minor" "$report" >"$lock.partial" <<'PYTHON'
import json, re, sys

minor, report = sys.argv[1:]
print(f"# Python {minor}: jaxscale[dev] and all that it needs. Written by scripts/lock.sh; do not edit.")
pins = {}
for item in json.load(open(report))["install"]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    pins[name] = item["metadata"]["version"]
del pins["jaxscale"]
for name in sorted(pins):
    print(f"{name}=={pins[name]}")
PYTHON
  mv "$lock.partial" "$lock"
  rm "$report"
  echo "lock: $(grep -c == "$lock") packages in requirements/py${minor/./}.txt"
}

[[ "${1:-}" == --upgrade ]] && UPGRADE=yes
for minor in $PYTHON_MINORS; do
  if python="$(find_python "$minor")"; then
    write_lock "$python" "$minor"
  else
    echo "lock: skipped Python $minor, which this machine lacks"
  fi
done
