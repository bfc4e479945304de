#!/usr/bin/env bash
# The install steps of both images, and of any other machine that shall have the same packages:
#
#     bash docker/install.sh FOLDER REQUIREMENTS [--system-site-packages]
#
# makes a virtual environment at FOLDER with the packages of REQUIREMENTS, each held against its
# hash, and this project.
set -euo pipefail
if (($# < 2)); then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
venv=$1
requirements=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# NVIDIA's image sets constraints for pip that contradict the pins.
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
# DeepSpeed's operators are compiled when they are first used, on the card that uses them.
export DS_BUILD_OPS=0

"${PYTHON:-python3}" -m venv "$@" "$venv"
# What builds this project (and DeepSpeed, which is source only); pip fetches nothing unpinned later.
"$venv/bin/pip" install --require-hashes --requirement docker/build.txt
"$venv/bin/pip" install --require-hashes --no-deps --no-build-isolation --requirement "$requirements"
"$venv/bin/pip" install --no-deps --no-build-isolation .
