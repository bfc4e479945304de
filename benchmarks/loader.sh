#!/usr/bin/env bash
# The loader against its peers on real photos, in class folders; DALI where it is installed.
#   benchmarks/loader.sh PHOTOS [WORK]
set -euo pipefail
photos=$1 work=${2:-loader}
mkdir -p "$work"
python3 -c 'import platform, datetime, os, torch; print(datetime.date.today(), platform.machine(), len(os.sched_getaffinity(0)), "cores, torch", torch.__version__)'
[[ -e $work/packed/dataset.json ]] || convnext data pack "$photos" "$work/packed" --images-per-shard 25
convnext bench loader --data "$work/packed" --images 800 --rounds 6 \
    --against timm,timm-unfetched,timm-uint8,timm-plain,torchvision,webdataset,dali 2>&1
