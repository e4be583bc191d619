#!/usr/bin/env bash
# Lint, types, floors and tests, in an environment that this script makes.
#
#   bash scripts/test.sh [--slow] [pytest arguments]
#
# --slow adds the tests marked slow and a smoke run on the newest other Python at hand. Under CI=true
# a missing tool fails the run after an attempt to install it; elsewhere its tests skip by name.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

# Programs that tests need and pip does not bring: "COMMAND PACKAGE what skips without it".
TOOLS=()
SMOKE_MINORS="3.13 3.12"

heading() {
  printf '\n== %s\n' "$1"
}

check_tools() {
  local command package tests
  while read -r command package tests; do
    [[ -n "$command" ]] || continue
    if [[ "${CI:-}" == true ]] && ! command -v "$command" >/dev/null; then
      apt-get install --yes --quiet "$package" || true
      command -v "$command" >/dev/null || fail "$command is missing and $package did not bring it"
    elif ! command -v "$command" >/dev/null; then
      echo "skipped without $command (package $package): $tests"
    fi
  done < <(printf '%s\n' "${TOOLS[@]:-}")
}

# Bring what some tests need and no developer must have: PyTorch, which scripts/bench_train.py
# compares with, and the TPU compiler. Those tests skip by name where it cannot be had.
install_extras() {
  local minor extra
  [[ "${JAXSCALE_VENV:-}" == none ]] && return
  minor="$("$VENV_PYTHON" -c 'import sys; print("%d%d" % sys.version_info[:2])')"
  for extra in bench tpu; do
    "$VENV_PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation \
      --constraint "requirements/py$minor.txt" --editable ".[$extra]" || [[ "${CI:-}" != true ]]
  done
}

# Run the tests marked smoke on the newest of SMOKE_MINORS that is here and is not the main Python.
smoke_test() {
  local minor python main
  main="$("$VENV_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  for minor in $SMOKE_MINORS; do
    if [[ "$minor" != "$main" ]] && python="$(find_python "$minor")"; then
      (
        PYTHON="$python" JAXSCALE_VENV=".venv-$minor" setup_venv
        "$VENV_PYTHON" -m pytest -m smoke --numprocesses 0
      )
      return
    fi
  done
  echo "smoke run skipped: none of Python $SMOKE_MINORS is here beside $main"
}

slow=no
for argument in "$@"; do
  [[ "$argument" == --slow ]] && slow=yes
done

heading "set-up"
setup_venv
check_tools

heading "lint and types"
"$VENV_PYTHON" -m ruff check
"$VENV_PYTHON" -m ruff format --check
"$VENV_PYTHON" -m mypy

if [[ "$slow" == yes || "${CI:-}" == true ]]; then
  heading "PyTorch and the TPU compiler, for the tests of both"
  install_extras
  heading "smoke run on another Python"
  smoke_test
else
  echo "skipped without --slow: the tests marked slow, and the smoke run on another Python"
fi

# One process per core; this stays the last command, so that its summary is the last line.
heading "tests"
exec "$VENV_PYTHON" -m pytest --numprocesses "$(nproc 2>/dev/null || echo 2)" --dist worksteal "$@"
