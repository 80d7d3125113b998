#!/usr/bin/env bash
# C++ tests of the kernel: `plain`, cross-compiled for `aarch64` and run under qemu, or with `sanitizers`, which
# also runs the tests of tests/host on an extension that has them built in.
set -euo pipefail
cd "$(dirname "$0")/.."

how=${1:?expected plain, aarch64 or sanitizers}
out=build/test-native/$how

refuse() {
  echo "test_native.sh: $*" >&2
  exit 1
}

# need COMMAND PACKAGE: installs a Debian package where a command is missing and apt may do so.
need() {
  command -v "$1" >/dev/null && return
  command -v apt-get >/dev/null || refuse "needs $1; here is no apt-get that could install $2"
  [ "$(id -u)" = 0 ] || refuse "needs $1; install it with: sudo apt-get install $2"
  apt-get install -y -qq "$2" >/dev/null || refuse "needs $1; apt-get install $2 failed"
}

run_cpp() {
  cmake -S tests/host/native -B "$out" "$@" >/dev/null
  cmake --build "$out" --parallel 2
  ctest --test-dir "$out" --output-on-failure
}

need cmake cmake
case $how in
  plain)
    run_cpp
    ;;
  aarch64)
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    need qemu-aarch64 qemu-user
    run_cpp -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
      "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
    ;;
  sanitizers)
    run_cpp -DXLARANK_SANITIZE=ON
    python=${PYTHON_OF_VENV:-.venv/bin/python}
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$out/site" . \
      --config-settings=cmake.define.XLARANK_SANITIZE=ON
    # The runtime comes first by LD_PRELOAD, because Python isn't built for it; leaks of Python's own don't count.
    # An editable install would be found before the folder. Tests of a SIGSEGV and of a limited address space can't here.
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
      ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$PWD/$out/site" "$python" -P -c '
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable_" not in type(finder).__module__]
import pytest
import xlarank.host._native as built
assert built.__file__.startswith(sys.argv[1]), built.__file__
sys.exit(pytest.main(["-q", "tests/host", "-k", "not unused_features_is_never_read and not memory_that_the_system_refuses"]))' "$PWD/$out/site"
    ;;
  *) refuse "expected plain, aarch64 or sanitizers, got $how" ;;
esac
