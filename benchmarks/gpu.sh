#!/usr/bin/env bash
# Runs all measurements on a GPU, in at most nine minutes and without a network: `bash benchmarks/gpu.sh [DATA_DIR]`.
# DATA_DIR is the directory of MNIST; without it, the data are rendered digits. See benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python benchmarks/gpu.py ${1:+--data_dir "$1"}
