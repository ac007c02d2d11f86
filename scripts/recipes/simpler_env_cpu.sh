#!/usr/bin/env bash
# SimplerEnv on a machine of two cores: SFT checkpoint made here -> PPO -> both suites measured before and after, with the settings of
# configs/recipe/simpler_env_cpu.yaml. Run it again to go on where it stopped. Needs the assets: docs/how-to/simpler_env.md.
#
#   MS_ASSET_DIR=~/assets scripts/recipes/simpler_env_cpu.sh [--seed 0]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export LP_NUM_THREADS=${LP_NUM_THREADS:-1}
exec "${PYTHON:-.venv/bin/python}" scripts/make_train.py --recipe simpler_env_cpu "$@"
