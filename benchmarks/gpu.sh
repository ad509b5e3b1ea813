#!/usr/bin/env bash
# What a GPU can show, in one command of at most nine minutes, without a network: `bash benchmarks/gpu.sh [DATA_DIR]`.
# DATA_DIR is that of MNIST; without it, rendered digits. See benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python benchmarks/gpu.py ${1:+--data_dir "$1"}
