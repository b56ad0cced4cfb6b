#!/usr/bin/env bash
# Fetch the wheels that a GPU image with PyTorch and transformers usually lacks, for bench/gpu.sh --wheels: bench/fetch_wheels.sh DIR [3.12]
# Versions are those of constraints.txt; the second argument is the Python of that machine (Linux, x86-64).
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${1:-}" ] || { echo "usage: bench/fetch_wheels.sh DIR [PYTHON_VERSION]" >&2; exit 2; }
DIR=$1
VERSION=${2:-3.12}
PYTHON=${PYTHON:-python3}
mkdir -p "$DIR"

pinned() { for name in "$@"; do grep -i -E "^${name//-/[-_]}==" constraints.txt; done; }

# shellcheck disable=SC2046
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$VERSION" --dest "$DIR" \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
  $(pinned pydantic pydantic-core annotated-types typing-inspection typing-extensions datasets dill multiprocess pytest-timeout setuptools pybind11)
# Published as source only; the wheel is the same for every Python. DeepSpeed asks for the PyTorch that is installed here.
# shellcheck disable=SC2046
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$DIR" $(pinned deepspeed hjson)
du -sh "$DIR"
