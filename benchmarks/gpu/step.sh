#!/usr/bin/env bash
# Whole training steps against timm's and torchvision's on this machine's first GPU, and what stands
# between them and the roofline: T, B, L and V2-T at 224 px in bf16. Installs nothing.
#
#   benchmarks/gpu/step.sh                                                      everything
#   MODELS=in1k_tiny,in1k_base SECONDS_LEFT=570 benchmarks/gpu/step.sh          a part, within a limit
#   TOY=1 benchmarks/gpu/step.sh                       at toy size on a CPU, in about a minute
#
# Writes JSON and Markdown into $OUT (default: benchmarks/gpu/results), the most important first: the
# depthwise convolutions alone; every model against the peers that start fast; every model against all
# of them, which replaces the report before; memory. What fails is told, and the rest goes on. Within
# SECONDS_LEFT nothing is begun that is not likely to end, and what does not end is stopped.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
out=${OUT:-$here/results}
limit=${SECONDS_LEFT:-86400}
fast=timm,convnext-compile,torchvision slow=timm-max-autotune-no-cudagraphs,timm-max-autotune
models=in1k_tiny,in1k_base,in1k_large,v2_in1k_tiny shapes=convnext_tiny,convnext_base,convnext_large
size=(--size 224 --device cuda) precision=(--precision bf16) rounds=(--rounds 5 --steps 20)
batch=128 small=64
if [[ -n ${TOY:-} ]]; then
    fast=timm-eager slow='' models=v2_in1k_atto shapes=convnextv2_atto
    size=(--size 32 --device cpu) precision=(--precision fp32) rounds=(--rounds 1 --steps 1)
    batch=4 small=2
fi
models=${MODELS:-$models}
mkdir -p "$out"
log=$out/step.log
: >"$log"
failed=0

# run NAME SECONDS ARGUMENTS...: one measurement, if that many seconds are left; its output into the log
run() {
    local name=$1 needed=$2 started=$SECONDS code
    shift 2
    if ((SECONDS + needed > limit)); then
        echo "== $name: not begun, $((limit - SECONDS)) s are left" | tee -a "$log"
        return
    fi
    echo "== $name" | tee -a "$log"
    timeout "$((limit - SECONDS))" "$python" -m convnext_cli bench "$@" 2>&1 | tee -a "$log"
    code=$?
    ((code == 0)) || failed=1
    echo "== $name: $((SECONDS - started)) s, exit code $code" | tee -a "$log"
}

# steps NAME SECONDS RECIPE PEERS: in smaller batches where a system runs out of memory
steps() {
    local before arguments=("${size[@]}" "${precision[@]}" "${rounds[@]}" --profile --out "$out")
    before=$(wc -l <"$log")
    run "$1" "$2" step "$3" "${arguments[@]}" --against "$4" --batch "$batch"
    if grep -qi 'out of memory' <(tail -n "+$((before + 1))" "$log"); then
        run "$1, batches of $small" "$2" step "$3" "${arguments[@]}" --against "$4" --batch "$small"
    fi
}

run "depthwise convolutions" 30 depthwise --models "$shapes" --batch "$batch" "${size[@]}" --out "$out"
# One model after the other: the systems of one keep a dozen cores busy while they compile.
for recipe in ${models//,/ }; do
    steps "$recipe" 150 "$recipe" "$fast"
done
for recipe in ${slow:+${models//,/ }}; do
    steps "$recipe against all" 300 "$recipe" "$fast,$slow"
done
for recipe in ${models//,/ }; do # not compiled, as the plan estimates it; nine networks are built
    run "memory of $recipe" 40 step "$recipe" "${size[@]}" "${precision[@]}" --kernels eager --rounds 1 \
        --steps 1 --batch "$batch" --against '' --memory --out "$out/memory"
done
# what was measured to choose kernels, for each shape of a stage
cp "${XDG_CACHE_HOME:-$HOME/.cache}"/convnext/kernels/*.json "$out"/ 2>/dev/null || true
exit "$failed"
