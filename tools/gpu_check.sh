#!/usr/bin/env bash
# What only a GPU can show, within eight minutes: a table, and gpu_check.json ($OUT, or --output).
#
#   tools/gpu_check.sh                     # every part
#   tools/gpu_check.sh train_codec tick    # some: tests, train_codec, train_s2s, tick
#   GPU_CHECK_SMOKE=1 tools/gpu_check.sh   # tiny, on any machine: only whether the parts run
#   tools/gpu_check.sh wheels              # fetch into .carry what a GPU image may lack, and moshi
#
# `tick` measures the package moshi beside the engine where it is installed (pip install --no-deps
# moshi; pip install einops sentencepiece) or among the wheels. Where nothing can be downloaded:
# `tools/gpu_check.sh wheels` on a machine with a network, then .carry goes along with the tree.
# Python is $PYTHON, .venv's or python3; wheels in .carry are used for what it lacks.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
"$python" -c "import torch" 2>/dev/null || python=python3

if [ "${1:-}" = wheels ]; then
    platforms=()
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    names=(soundfile soxr cffi pycparser datasets dill multiprocess)
    versions=$("$python" -m pip list --format=freeze | grep -iE "^($(IFS='|'; echo "${names[*]}"))==")
    rm -rf .carry && mkdir .carry
    # shellcheck disable=SC2086  # one word a package
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
        --python-version "${GPU_CHECK_PYTHON:-3.12}" "${platforms[@]}" -d .carry $versions \
        moshi einops sentencepiece
    du -sh .carry
    exit
fi

if ! "$python" -c "import soundfile, soxr, datasets, moshi" 2>/dev/null && compgen -G ".carry/*.whl" >/dev/null
then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .carry/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" tools/gpu_check.py "$@"
