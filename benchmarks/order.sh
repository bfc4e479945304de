#!/usr/bin/env bash
# What the plan of any step costs at the size of ImageNet-22K, and how well the orders mix.
#   benchmarks/order.sh
set -euo pipefail
python3 -c 'import platform, datetime, os, numpy; print(datetime.date.today(), platform.machine(), len(os.sched_getaffinity(0)), "cores, numpy", numpy.__version__)'
for kind in window full; do
    convnext bench order --images 14197122 --shards 1420 --kind "$kind" 2>&1
done
convnext bench order --images 1281167 --shards 1282 --world 32 2>&1
