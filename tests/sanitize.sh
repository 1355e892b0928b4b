#!/usr/bin/env bash
# The C++ code under AddressSanitizer and UndefinedBehaviorSanitizer: builds the extension with both in a copy of the
# tree and runs the tests that reach it. Anything either of them reports ends the run with an error.
#
#   tests/sanitize.sh                      # tests/ops, tests/cache and tests/graph: some minutes
#   tests/sanitize.sh tests/ops -k write   # what is given instead, as for pytest
#
# Wants GCC, and torch and the test requirements in the Python on PATH. GPT2RT_SANITIZE_DIR keeps the build for the next
# run; without it a temporary folder is used and removed.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${GPT2RT_SANITIZE_DIR:-}
if [ -z "$build" ]; then
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
fi
mkdir -p "$build"
# what git knows or would know, so neither old builds nor caches come along; files that have not changed keep their age
git ls-files -z -co --exclude-standard | xargs -0 cp -Pp --parents -t "$build"
cd "$build"

# -O1 keeps the checks affordable and the stacks readable; a report of undefined behaviour ends the program
export CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
export LDFLAGS="-fsanitize=address,undefined"
python setup.py -q build_ext --inplace

# Python itself is built without them, so the runtime comes first. torch and Python never free some memory, hence no
# leak detection; torch's allocator may hand out memory without asking which function frees it.
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export GPT2RT_REQUIRE_CPP=1 PYTHONPATH="$PWD" PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
unset CXXFLAGS LDFLAGS
if [ $# -eq 0 ]; then set -- tests/ops tests/cache tests/graph; fi
# a test takes many times as long here; those that limit a process's address space cannot run, for the sanitizer
# reserves terabytes of it
LD_PRELOAD="$libraries" python -m pytest -q -p no:cacheprovider --timeout=1800 \
  --deselect tests/ops/test_threads_cpu.py::test_fewer_threads_when_the_system_gives_none "$@"
