#!/usr/bin/env bash
# Make the virtual environment that every other script runs in. Quick when nothing has changed.
#
#   bash scripts/setup.sh                 creates .venv from the lock of this Python
#   source scripts/setup.sh; setup_venv   the same for a script, which then runs "$VENV_PYTHON"
#
# PYTHON         interpreter to build on (default: python3); 3.11, 3.12 or 3.13
# JAXSCALE_VENV  folder in the repository (default: .venv; its name begins with .venv), or "none" to
#                use PYTHON as it is, with nothing installed (containers that already have it all)
# Packages come from wherever pip is configured to look.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON_MINORS="3.11 3.12 3.13"

fail() {
  echo "$1" >&2
  exit 2
}

# Print what an environment depends on, for the interpreter $1: "MINOR BASE CONTENT". BASE changes
# with the interpreter or the place of the repository, CONTENT with what is to be installed. The
# code runs on any Python, so that an old one can be refused by name.
identify_python() {
  "$1" - "$ROOT" <<'PYTHON'
import hashlib, os, sys

root = sys.argv[1]
minor = "%d.%d" % sys.version_info[:2]
base = hashlib.sha256((root + sys.version + getattr(sys, "base_prefix", "")).encode()).hexdigest()
content = hashlib.sha256()
for name in ("pyproject.toml", "requirements/py%s.txt" % minor.replace(".", "")):
    path = os.path.join(root, name)
    if os.path.exists(path):
        with open(path, "rb") as file:
            content.update(file.read())
sys.stdout.write("%s %s %s\n" % (minor, base, content.hexdigest()))
PYTHON
}

# Print an interpreter of the minor version $1, if this machine has one.
find_python() {
  local candidate
  for candidate in "python$1" python3 "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if [[ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$1" ]]; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Fill the environment $1 for Python $2 and leave what it was made from in its stamp.
install_packages() {
  local venv="$1" minor="$2"
  echo "setup: installing requirements/py${minor/./}.txt (a few minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --requirement "$ROOT/requirements/py${minor/./}.txt"
  echo "setup: installing jaxscale, editable"
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --no-deps --no-build-isolation --editable "$ROOT"
}

setup_venv() {
  local python="${PYTHON:-python3}" name="${JAXSCALE_VENV:-.venv}" minor base content venv stamp
  command -v "$python" >/dev/null || fail "PYTHON=$python: no such program; install Python 3.11, 3.12 or 3.13"
  if [[ "$name" == none ]]; then
    VENV_PYTHON="$(command -v "$python")"
    return
  fi
  [[ "$name" == .venv* && "$name" != */* ]] || fail "JAXSCALE_VENV=$name: the name must begin with .venv"

  read -r minor base content <<<"$(identify_python "$python")"
  [[ " $PYTHON_MINORS " == *" $minor "* ]] ||
    fail "PYTHON=$python is Python $minor; jaxscale runs on $PYTHON_MINORS: set PYTHON to one of them"
  venv="$ROOT/$name"
  # shellcheck disable=SC2034  # for the script that sourced this one
  VENV_PYTHON="$venv/bin/python"
  stamp="$venv/.jaxscale"
  [[ -x "$VENV_PYTHON" && "$(cat "$stamp" 2>/dev/null)" == "$base $content" ]] && return

  # Without the first word of the stamp the environment is half made, or of another interpreter.
  if [[ ! -x "$VENV_PYTHON" || "$(cut -d' ' -f1 "$stamp" 2>/dev/null)" != "$base" ]]; then
    echo "setup: creating $name with Python $minor"
    "$python" -m venv --clear "$venv" ||
      fail "$python cannot make a virtual environment; install its venv module (Debian: python$minor-venv)"
    echo "$base" >"$stamp"
  fi
  install_packages "$venv" "$minor"
  echo "$base $content" >"$stamp"
  echo "setup: $name is ready"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  setup_venv
fi
