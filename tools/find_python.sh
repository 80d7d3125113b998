#!/usr/bin/env bash
# Prints the Python to use: $PYTHON if set, else the newest CPython from 3.11 up that works, on PATH or
# under pyenv; with an argument such as 3.11, one of that version. Checks first that a C++17 compiler is
# there. Says what is missing and ends with status 1.
set -euo pipefail

works() {  # a CPython from 3.11 up that can make virtual environments and build extensions
  "$1" -c 'import ensurepip, os, sys, sysconfig, venv
is_cpython = sys.implementation.name == "cpython" and sys.version_info >= (3, 11)
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not (is_cpython and os.path.exists(header)))' >/dev/null 2>&1
}

missing() {
  printf 'xlarank needs %s\n' "$1" >&2
  exit 1
}

compiler=${CXX:-}
if [ -z "$compiler" ]; then
  for name in c++ g++ clang++; do
    if command -v "$name" >/dev/null 2>&1; then compiler=$name; break; fi
  done
fi
[ -n "$compiler" ] || missing "a C++17 compiler (g++ or clang++): on Debian, apt-get install g++"
echo 'int main() { if (int x = 0; x) return x; return 0; }' |
  $compiler -std=c++17 -fsyntax-only -x c++ - >/dev/null 2>&1 ||
  missing "a C++17 compiler; $compiler doesn't compile C++17"

if [ -n "${PYTHON:-}" ] && [ $# -eq 0 ]; then
  works "$PYTHON" || missing "CPython 3.11 or later with venv and C headers; PYTHON=$PYTHON isn't one"
  "$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.executable))'
  exit 0
fi

versions=${1:-3.20 3.19 3.18 3.17 3.16 3.15 3.14 3.13 3.12 3.11}
pyenv_root=${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}
candidates=$(
  for version in $versions; do
    command -v "python$version" 2>/dev/null || true
    ls -d "$pyenv_root"/versions/"$version".*/bin/python3 2>/dev/null | sort -rV || true
  done
  [ $# -gt 0 ] || command -v python3 2>/dev/null || true
)
while IFS= read -r python; do
  # An executable's name can lie (pyenv's shims): trust what it says of itself.
  if [ -n "$python" ] && works "$python"; then
    "$python" -c 'import os, sys; print(os.path.realpath(sys.executable))'
    exit 0
  fi
done <<<"$candidates"
missing "CPython 3.11 or later with venv and C headers; on Debian: apt-get install python3-venv python3-dev; PYTHON names one"
