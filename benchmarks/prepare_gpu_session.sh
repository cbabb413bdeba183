#!/usr/bin/env bash
# What benchmarks/gpu_session.py needs on a machine without network, in one folder that is small enough to carry:
# wheels for Python 3.12 on x86-64 Linux, a corpus, a tokenizer of 32,768 tokens, and the commit.
#   benchmarks/prepare_gpu_session.sh [FOLDER]      (default: gpu-session in the checkout)
# Needs the installed project (./launch.sh test --version makes .venv) and a package index. A folder that is there is
# completed; wheels and commit are made anew.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$here/gpu-session}"
python="${VIRTUAL_ENV:-$here/.venv}/bin/python"
limit=$((64 * 1024 * 1024))

# The GPU's machine has torch, transformers and what these bring; the rest is the tested versions.
packages=(hjson msgpack annotated-types typing-inspection pydantic pydantic_core orjson rensa zstandard gigatoken)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64
    manylinux2014_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux_2_5_x86_64 manylinux1_x86_64)

fail() { echo "prepare_gpu_session.sh: $*" >&2; exit 1; }
[ -x "$python" ] || fail "$python is not there: run ./launch.sh test --version first, or activate an environment"
cd "$here"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

pinned() { grep -m1 -i "^$1==" constraints.txt | cut -d' ' -f1 || fail "constraints.txt has no $1"; }

rm -rf "$out/wheels"
mkdir -p "$out/wheels"
pip=("$python" -m pip --disable-pip-version-check)
wanted=()
for package in "${packages[@]}"; do wanted+=("$(pinned "$package")"); done
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]/#/--platform=}" --dest "$out/wheels" "${wanted[@]}"
# Liger's kernels are one of the levers; the project does not depend on them.
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$out/wheels" liger-kernel
# DeepSpeed comes as source alone. Its operators are built where they run, so the wheel fits any Python.
DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out/wheels" "$(pinned deepspeed)"

if [ ! -f "$out/corpus/corpus.json" ]; then
    mapfile -t sources < <("$python" -c \
        'from codeparrot_ds.demo import standard_library_sources; print(*standard_library_sources(), sep="\n")')
    "$python" -m codeparrot_ds corpus "${sources[@]}" --out "$out/corpus" --compress zst --overwrite
fi
if [ ! -f "$out/tokenizer/tokenizer.json" ]; then
    "$python" -m codeparrot_ds tokenizer --data "$out/corpus" --out "$out/tokenizer" --vocab-size 32768
fi
"$python" -c 'import sys; sys.path[:0] = ["benchmarks"]; import record; print(record.commit())' > "$out/COMMIT"

size="$(du -sb "$out" | cut -f1)"
du -sh "$out"/*
[ "$size" -le "$limit" ] || fail "$out has $size bytes, more than the $limit that are carried"
echo "$out is ready ($((size / 1000000)) MB, commit $(< "$out/COMMIT"))"
