#!/usr/bin/env bash
# One command for a machine with a GPU and no network: the tests that run on a GPU, then speed and memory of a real-size
# Qwen-VLA with drawn weights. Needs Python with torch (CUDA), transformers, tensordict, jaxtyping, safetensors and
# numpy; for the tests also pytest, hypothesis and beartype. No simulator, no Ray, no Hydra.
#
#   scripts/gpu_check.sh [OUTPUT] [options of gpu_check.py]
#
# PYTHON chooses the interpreter, DEVICE the device (cuda).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
output=${1:-runs/gpu_check}
shift || true
mkdir -p "$output"
export PYTHONPATH=.:algos:envs HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=0
if "$python" -c 'import pytest, hypothesis, beartype' 2>/dev/null; then
  RLVLA_TEST_DEVICE=$device "$python" -m pytest -q -m device tests/unit/test_numerics.py \
    >"$output/tests.txt" 2>&1 || failed=1
  tail -n 3 "$output/tests.txt" >&2
else
  echo "pytest, hypothesis or beartype is missing: the tests are left out" | tee "$output/tests.txt" >&2
fi
"$python" scripts/gpu_check.py --device "$device" --output "$output" "$@" | tail -n 1
exit $failed
