#!/usr/bin/env bash
# The benchmarks on a GPU: the same scripts, TRL with its fastest settings (flash attention and liger kernels where they
# are installed, which this says). PYTHON names the interpreter of an environment with '.[bench]'; further words go to
# the script: BENCH=peft benchmarks/gpu.sh --size 40m --write docs/benchmarks.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "gpu.sh: no NVIDIA GPU answers here" >&2; exit 1; }
"$PYTHON" - <<'PY'
import importlib.util
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU; install a build with CUDA")
for module, package in (("liger_kernel", "liger-kernel"), ("flash_attn", "flash-attn")):
    if importlib.util.find_spec(module) is None:
        print(f"{package} is not installed: TRL runs without it, which is not its fastest", file=sys.stderr)
PY
exec "$PYTHON" "benchmarks/${BENCH:-sft}.py" --device cuda "$@"
