#!/usr/bin/env bash
#SBATCH --job-name=convnext
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=convnext-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#
# NAME
#     multinode.sh - `convnext train` on the nodes of a Slurm job, requeued until it is done
#
# SYNOPSIS
#     RECIPE=in1k_tiny DATA=/data/imagenet NODES=4 GPUS=8 slurm/multinode.sh
#     RECIPE=in1k_tiny DATA=/data/imagenet sbatch --nodes=4 slurm/multinode.sh
#
#     The first form submits this file with the shape that NODES and GPUS ask for. The second
#     leaves the shape to sbatch: --nodes, and --gpus-per-node with --ntasks-per-node where a node
#     has not eight GPUs. SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_TIMELIMIT are
#     sbatch's own variables and work in both.
#
# VARIABLES
#     RECIPE      name of a recipe, or path of a recipe file (wanted)
#     DATA        packed data set: a folder that all nodes see, or a URL (default: the recipe's)
#     NAME        name of the run (default: that of the recipe)
#     RUNS_DIR    folder of all runs, on a file system that all nodes share (default: runs)
#     EXTRA       more arguments of `convnext train`, quoted as in a shell:
#                 EXTRA='optim.lr=2e-3 --precision bf16'
#     NODES       number of nodes (default 1)
#     GPUS        GPUs of a node; a process drives one (default 8)
#     VENV        virtual environment with convnext, on a file system that all nodes share
#     CONTAINER   image with convnext instead: a .sif file runs under apptainer, anything else is
#                 given to srun --container-image (pyxis)
#     MOUNTS      what the container sees, in its own notation: /data:/data,/scratch:/scratch
#     CACHE       folder on the disk of each node for shards that come from a URL
#                 (default: $SLURM_TMPDIR, $TMPDIR or /tmp, and there convnext-$USER)
#     RESTARTS    restarts in a row without a new checkpoint before the job gives up (default 3)
#     PORT        port of the rendezvous (default: from the job's number)
#
# WHAT IT LEAVES
#     RUNS_DIR/NAME/               the run (see README.md); the same command again goes on with it
#     RUNS_DIR/NAME/launch/rank0000.log, ...    what each process said, over all attempts
#     RUNS_DIR/NAME/launch/progress             job, newest step, attempts that added none
#
# SIGNALS
#     120 seconds before the time limit Slurm sends USR1 to the processes of the step, not to this
#     shell (`--signal=B:USR1@120` would do that, and the training would not hear it). They agree
#     on a step, save, and end with 75. `scancel --signal=USR1 JOB` and `--signal=TERM` do the
#     same at any time, and so does preemption with a grace time. Time for a checkpoint must fit
#     between warning and end: raise the 120 for slow storage.
#
# EXIT CODE
#     0 done; 2 a mistake in what was asked; 71 diverged; 74 storage: final, nothing is requeued.
#     75 stopped by a signal, 76 a process hangs or is lost, 128 + n one that a signal ended or that
#     left no word (its node failed): `scontrol requeue`, unless RESTARTS of them in a row added no
#     checkpoint; then the job ends with that code. 1 is a bug, with its traceback in the logs.
#     `scancel JOB` is obeyed: the job is not requeued.

set -euo pipefail

fail() {
    echo "error: $1" >&2
    echo >&2
    echo "hint: $2" >&2
    exit 2
}

say() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) job $SLURM_JOB_ID attempt ${SLURM_RESTART_COUNT:-0}: $*"; }

[[ -n ${RECIPE:-} ]] || fail "RECIPE is not set" "RECIPE=in1k_tiny DATA=/data/imagenet $0"
stem=${RECIPE##*/}
NAME=${NAME:-${stem%.*}}
RUNS_DIR=${RUNS_DIR:-runs}
RESTARTS=${RESTARTS:-3}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    command -v sbatch >/dev/null || fail "there is no sbatch on this machine" \
        "run this on a login node of the cluster, or here: convnext launch local $RECIPE"
    export RECIPE
    exec sbatch --job-name="$NAME" --nodes="${NODES:-1}" --ntasks-per-node="${GPUS:-8}" \
        --gpus-per-node="${GPUS:-8}" "$0"
fi

[[ ${NODES:-$SLURM_JOB_NUM_NODES} == "$SLURM_JOB_NUM_NODES" ]] ||
    fail "NODES=$NODES, but this job has $SLURM_JOB_NUM_NODES" "sbatch --nodes=$NODES $0"
[[ -n ${SLURM_NTASKS_PER_NODE:-} ]] ||
    fail "this job does not say how many processes a node has" "sbatch $0, or salloc --ntasks-per-node=8"
[[ ${GPUS:-$SLURM_NTASKS_PER_NODE} == "$SLURM_NTASKS_PER_NODE" ]] ||
    fail "GPUS=$GPUS, but this job has $SLURM_NTASKS_PER_NODE processes a node" \
        "sbatch --gpus-per-node=$GPUS --ntasks-per-node=$GPUS $0"

job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
run=$RUNS_DIR/$NAME
launch=$run/launch
mkdir -p "$launch"

# --- Is there progress? -------------------------------------------------------------------------

newest_step() { # the step of the newest checkpoint, 0 where there is none
    local path newest=0
    for path in "$run"/checkpoints/step=*.ckpt; do
        [[ -e $path ]] || continue
        path=${path##*/step=}
        path=$((10#${path%.ckpt}))
        ((path <= newest)) || newest=$path
    done
    echo "$newest"
}

# Counted when an attempt begins as well as when it ends: an attempt whose node fails never ends.
first_step=$(newest_step)
stalls=0
if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -r $launch/progress ]]; then
    read -r before step stalls <"$launch/progress" || true
    if [[ $before != "$job" ]] || ((first_step > step)); then stalls=0; else stalls=$((stalls + 1)); fi
fi
if ((stalls > RESTARTS)); then
    say "$stalls attempts in a row ended at step $first_step; not trying again"
    say "read $launch/rank*.log, then submit again"
    exit 137 # that none of them could tell its own is what a node does that fails
fi
echo "$job $first_step $stalls" >"$launch/progress"

# --- What each process needs to know ------------------------------------------------------------

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below the ports that systems hand out by themselves (32768 and up); two jobs that share a node
# have different numbers.
MASTER_PORT=${PORT:-$((12000 + SLURM_JOB_ID % 20000))}
WORLD_SIZE=$SLURM_NTASKS
LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
TORCHELASTIC_RUN_ID=$SLURM_JOB_ID
export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID

# The loader's processes do the work of the CPU; more threads in each make all of them slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A collective that fails ends its process instead of leaving it to wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# Every process leaves its exit code here: srun tells one number for all of them.
CONVNEXT_EXIT_DIR=$(realpath "$launch")/exits-$job.${SLURM_RESTART_COUNT:-0}
CONVNEXT_EXIT_RANKS=$WORLD_SIZE
export CONVNEXT_EXIT_DIR CONVNEXT_EXIT_RANKS
rm -rf "$CONVNEXT_EXIT_DIR"
mkdir "$CONVNEXT_EXIT_DIR"

CACHE=${CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/convnext-${USER:-$(id -un)}}
arguments=(train "$RECIPE" --name "$NAME" --runs-dir "$RUNS_DIR" "data.cache_dir=$CACHE")
[[ -z ${DATA:-} ]] || arguments+=(--data "$DATA")
words=$(xargs -r -n 1 printf '%s\n' <<<"${EXTRA:-}") || # quotes are read, nothing is run
    fail "EXTRA=$EXTRA cannot be read: a quote in it has no end" "EXTRA='optim.lr=2e-3 seed=1'"
[[ -z $words ]] || mapfile -t -O "${#arguments[@]}" arguments <<<"$words"

if [[ -n ${VENV:-} ]]; then
    [[ -n ${CONTAINER:-} || -x $VENV/bin/python ]] || fail "VENV=$VENV has no bin/python on $(hostname)" \
        "name a virtual environment on a file system that all nodes share"
    export PATH=$VENV/bin:$PATH
fi
inside=()
srun_more=()
case ${CONTAINER:-} in
    '') ;;
    *.sif) # apptainer would end with 255, as if a signal had ended it
        [[ -r $CONTAINER ]] || fail "CONTAINER=$CONTAINER is no file that can be read on $(hostname)" \
            "name an image on a file system that all nodes share"
        inside=(apptainer exec --nv ${MOUNTS:+--bind "$MOUNTS"} --pwd "$PWD" "$CONTAINER")
        ;;
    *) srun_more=(--container-image="$CONTAINER" --container-workdir="$PWD"
        ${MOUNTS:+--container-mounts="$MOUNTS"}) ;;
esac

# --- Train --------------------------------------------------------------------------------------

# A task sees what torchrun would tell it. So one way of starting serves everywhere, and Lightning
# does not requeue by itself: it would save in the middle of a step. A Python without the package
# would leave no word, as one that was killed.
# shellcheck disable=SC2016 # the variables are those of a task
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
look="import importlib.util as u, sys; sys.exit(2 * (u.find_spec(\"convnext_cli\") is None))"
words=$1 code=0
shift
"${@:1:words}" -c "$look" || code=$?
if ((code == 2)); then
    echo "error: ${*:1:words} has no package convnext on $(hostname)" >&2
    echo >&2
    echo "hint: install convnext there, or name another CONTAINER or VENV" >&2
    echo 2 >"$CONVNEXT_EXIT_DIR/$RANK"
    exit 2
fi
exec "$@"'
python=("${inside[@]}" python)

told=
trap 'told=TERM' TERM # the end of the job; the processes are told by Slurm, and are waited for
trap : USR1

say "from step $first_step on $SLURM_JOB_NODELIST: ${arguments[*]}"
# Not bound to cores: a process and its loaders share those of the node, and the plan counts them.
# Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch by itself.
srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none --ntasks="$WORLD_SIZE" \
    --ntasks-per-node="$LOCAL_WORLD_SIZE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --label --open-mode=append --output="$launch/rank%4t.log" "${srun_more[@]}" \
    bash -c "$task" task "${#python[@]}" "${python[@]}" -m convnext_cli "${arguments[@]}" &
step=$!
srun_code=0
while kill -0 "$step" 2>/dev/null; do # a trap interrupts `wait`
    srun_code=0
    wait "$step" || srun_code=$?
done

# --- How did it end? ----------------------------------------------------------------------------

declare -A seen=()
left=0
for path in "$CONVNEXT_EXIT_DIR"/*; do
    [[ -e $path ]] || continue
    seen[$(<"$path")]=1
    left=$((left + 1))
done
rm -rf "$CONVNEXT_EXIT_DIR"

# The first of these that any process left is the reason; the others stopped because of it.
code=
for reason in 71 74 2 75 76; do
    [[ -z ${seen[$reason]:-} ]] || { code=$reason && break; }
done
if [[ -z $code ]]; then
    code=$srun_code
    # Whoever left no word was killed, with its node or alone; the rest failed for want of it. But
    # 126 and 127 say that there is no such command: none begins.
    if ((left < WORLD_SIZE && code != 76 && code < 126)); then code=137; fi
fi

case $code in
    0)
        say "done at step $(newest_step)"
        exit 0
        ;;
    75 | 76 | 12[89] | 1[3-9]? | 2??) ;;
    *)
        say "ended with exit code $code; read $launch/rank*.log"
        exit "$code"
        ;;
esac

last_step=$(newest_step)
if ((last_step > first_step)); then stalls=0; else stalls=$((stalls + 1)); fi
if ((stalls > RESTARTS)); then
    say "exit code $code; $stalls attempts in a row ended at step $last_step; not trying again"
    exit "$code"
fi

# After `scancel`, and where Slurm requeues by itself, the job is not running any more. SIGNALING is
# a running one whose nodes have not all told yet that they passed the warning on.
read -r state why < <(squeue --noheader --jobs="$job" --format='%T %r') || true
if [[ ${state:-} != @(RUNNING|SIGNALING) && ${why:-} != TimeLimit ]]; then
    say "exit code $code at step $last_step; the job is ${state:-gone} (${why:-}${told:+, $told}): Slurm decides"
    exit "$code"
fi
say "exit code $code at step $last_step; requeued"
scontrol requeue "$job" || say "cannot be requeued; submit again to go on from step $last_step"
exit "$code"
