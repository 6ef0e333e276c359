#!/usr/bin/env bash
# The measurements that need a GPU, in one command without a network: tests, attention, a FLUX.1-shaped model, warm starts.
#
#   bench/gpu/run.sh --out results --wheels wheels [--stages "tests attention model warm backward more-tests"] [--tiny] [--python python3]
#
# Every stage stops at its limit (8 minutes together on an H100), writes its rows as it measures them, and runs whether or not
# an earlier one has failed. Rows go to OUT/rows.jsonl, tables to OUT/gpu.md, what was printed to OUT/<stage>.log.
#
# Needed beside torch, triton, transformers, accelerate, peft, hypothesis and pytest: diffusers and torchao. Without a network,
# a folder of wheels is installed beside this script's copy of flexclear; to make one (10 MB):
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels \
#       diffusers==0.42.1 torchao==0.18.0 importlib_metadata zipp
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
out=$here/bench/results/gpu wheels= python=python3 stages="tests attention model warm backward more-tests" tiny=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --stages) stages=$2; shift 2 ;;
        --python) python=$2; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        *) echo "unknown argument $1: see the head of $0" >&2; exit 2 ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
rows=$out/rows.jsonl
: > "$rows"

# flexclear as it would be installed: two of its packages lie beside the others.
mkdir -p "$work/site" && cp -r "$here/flexclear" "$work/site/" || exit 2
cp -r "$here/masks" "$here/compile" "$work/site/flexclear/" || exit 2
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl || exit 2
fi
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}:$here
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
cd "$work" || exit 2

# stage NAME LIMIT COMMAND...: what it prints goes into its log, how it ended into the rows.
stage() {
    local name=$1 limit=$2 start=$SECONDS rc
    shift 2
    case " $stages " in *" $name "*) ;; *) return ;; esac
    timeout -s INT -k 5 "$limit" "$@" > "$out/$name.log" 2>&1  # interrupted, pytest still says what has failed
    rc=$?
    echo "{\"stage\": \"$name\", \"returned\": $rc, \"seconds\": $((SECONDS - start)), \"limit_s\": $limit}" >> "$rows"
    echo "$name: returned $rc after $((SECONDS - start)) s"
    [ $rc = 0 ] || tail -5 "$out/$name.log"
}

# -v: each test is named as it ends, so that a run which is killed has said what failed.
run_tests=("$python" -m pytest -m gpu -v -n 12 --dist load -p no:cacheprovider -W ignore --tb short --show-capture no
    --rootdir "$here" -c "$here/pyproject.toml")
others=$(grep -rl "mark.gpu" "$here/tests" --include='*.py' | grep -v tests/test_cuda.py)
stage tests "${TESTS_S:-60}" "${run_tests[@]}" "$here/tests/test_cuda.py"
stage attention "${ATTENTION_S:-110}" "$python" -m bench.gpu.attention "$rows" --limit $((${ATTENTION_S:-110} - 25)) $tiny
stage model "${MODEL_S:-180}" "$python" -m bench.gpu.model "$rows" --limit $((${MODEL_S:-180} - 25)) \
    --artifacts "$work/artifacts" $tiny
TORCHINDUCTOR_CACHE_DIR=$work/other TRITON_CACHE_DIR=$work/other-triton \
    stage warm "${WARM_S:-40}" "$python" -m bench.gpu.model "$rows" --warm "$work/artifacts" $tiny
stage backward "${BACKWARD_S:-40}" "$python" -m bench.gpu.attention "$rows" --limit 25 --only-backward $tiny
stage more-tests "${MORE_TESTS_S:-50}" "${run_tests[@]}" $others
"$python" -m bench.gpu.report "$rows" "$out/gpu.md"
