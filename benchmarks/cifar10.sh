#!/usr/bin/env bash
# The whole path on real photos: pack, check, train, evaluate, fine-tune, export, predict.
#   benchmarks/cifar10.sh FOLDER_OR_ZIP [WORK]
# FOLDER_OR_ZIP holds train/<class>/*.jpg and val/<class>/*.jpg (CIFAR-10 as JPEG files). Each command
# is printed before it runs; benchmarks/cifar10.log is the last output.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$(realpath "$1")
work=$(realpath -m "${2:-$(mktemp -d)}")
mkdir -p "$work" && cd "$work"
if [ -f "$source" ]; then
    python3 -m zipfile -e "$source" photos
    source=$(dirname "$(find photos -type d -name train | head -n 1)")
fi
run() { printf '\n$ %s\n' "$*" | sed "s#$source#CIFAR10#g; s#$here#benchmarks#g"; "$@" 2>&1 | sed "s#$source#CIFAR10#g; s#$here#benchmarks#g"; }

run convnext data pack "$source" cifar10
run convnext data check cifar10
run convnext train "$here/cifar10.yaml" --data cifar10 --device cpu --name cifar10
run convnext evaluate runs/cifar10 --data cifar10
run convnext finetune --from runs/cifar10 --data cifar10 --device cpu --name finetuned \
    "$here/cifar10.yaml" schedule.length=1ep schedule.warmup=null optim.lr=2e-4 init.head=reset
run convnext runs list
best=runs/cifar10/checkpoints/best_ema.ckpt
run convnext weights convert "$best" --to timm --out cifar10_timm.pth
run convnext weights convert "$best" --to onnx --out cifar10.onnx
run convnext predict runs/cifar10 "$(find "$source/val" -name '*.jpg' | sort | head -n 1)"
run python3 "$here/same_predictions.py" cifar10 "$best" cifar10_timm.pth cifar10.onnx
