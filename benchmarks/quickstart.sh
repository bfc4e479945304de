#!/usr/bin/env bash
# The quick start with three seeds: best top-1 of each, and the time it took.
#   benchmarks/quickstart.sh [WORK]
set -euo pipefail
mkdir -p "${1:-quickstart}" && cd "${1:-quickstart}"
python3 -c 'import platform, datetime, os, torch; print(datetime.date.today(), platform.machine(), len(os.sched_getaffinity(0)), "cores, torch", torch.__version__)'
for seed in 0 1 2; do
    start=$SECONDS
    convnext train quickstart --device cpu --name "seed$seed" seed="$seed" 2> "seed$seed.log"
    printf 'seed %s: %s; %s s in all\n' "$seed" "$(grep '^finished' "seed$seed.log" | cut -c 12-)" "$((SECONDS - start))"
done
