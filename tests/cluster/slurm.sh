#!/usr/bin/env bash
# A real Slurm of several nodes on this machine, for tests. Needs root on Debian or Ubuntu.
#
#     slurm.sh up [NODES]     install what is missing, start; nothing to do where it runs (default 2)
#     slurm.sh down           end it, wherever it was started, and remove all but the packages
#     slurm.sh status         nodes and jobs
#     slurm.sh cut NODE       kill every process of a node at once, as a power cut does
#     slurm.sh mend NODE      start it again
#     slurm.sh kill NODE WORDS [SIGNAL]    signal a node's processes that hold WORDS (default KILL)
#
# A node is a network namespace with its own address on a bridge, a UTS namespace with its own
# name, and a PID namespace; the file system is shared, as on a cluster. The GPUs are empty files:
# Slurm counts them and nothing opens them. Clients need SLURM_CONF=$CLUSTER_DIR/slurm.conf.
set -euo pipefail

dir=${CLUSTER_DIR:-/var/tmp/convnext-cluster}
tag=cnx # of namespaces and links
net=10.78.0
export SLURM_CONF=$dir/slurm.conf

install() {
    type slurmctld slurmd srun munged ip unshare nsenter >/dev/null 2>&1 && return # all of them
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 util-linux >/dev/null
}

write_config() { # nodes
    local i memory
    mkdir -p "$dir"/{log,run,state,spool,gpu}
    chmod 755 "$dir" "$dir/run" # munged refuses a socket in a folder that others may write
    [[ -s $dir/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    {
        echo "127.0.0.1 localhost"
        echo "$net.1 ${tag}-ctl"
        for i in $(seq "$1"); do echo "$net.$((10 + i)) node$i"; done
    } >"$dir/hosts"
    : >"$dir/gpu/0"
    : >"$dir/gpu/1"
    echo "Name=gpu File=$dir/gpu/[0-1]" >"$dir/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$dir/cgroup.conf" # read, and not used
    memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
    cat >"$SLURM_CONF" <<CONF
ClusterName=convnext
SlurmctldHost=${tag}-ctl($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
SlurmctldPort=16827
SlurmdPort=16828
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=15
MinJobAge=3600
SchedulerParameters=bf_interval=2,sched_interval=2
GresTypes=gpu
$(for i in $(seq "$1"); do
        echo "NodeName=node$i NodeAddr=$net.$((10 + i)) CPUs=4 RealMemory=$memory Gres=gpu:2"
    done)
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

is_alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

start_host() { # name, command: in namespaces of its own; the command is the first process of a node
    local name=$1
    shift
    if is_alive "$dir/run/$name.host"; then return; fi
    setsid ip netns exec "$tag-$name" unshare --uts --pid --fork --mount-proc --kill-child \
        bash -c 'hostname "$1"; shift; "$@" & wait $!' host "$@" \
        </dev/null >>"$dir/log/host.$name.log" 2>&1 &
    echo $! >"$dir/run/$name.host"
}

start_node() {
    mkdir -p "$dir/spool/$1"
    start_host "$1" "$1" slurmd -D -N "$1"
}

first_process() { # of a host, as the machine numbers it
    local outer
    outer=$(<"$dir/run/$1.host")
    awk '{print $1}' "/proc/$outer/task/$outer/children"
}

cut_host() { # when the first process of a PID namespace dies, the kernel kills all others
    is_alive "$dir/run/$1.host" && kill -9 "$(first_process "$1")"
    rm -f "$dir/run/$1.host"
}

add_network() { # name, address
    local space=$tag-$1
    mkdir -p "/etc/netns/$space"
    cp "$dir/hosts" "/etc/netns/$space/hosts"
    [[ ! -e /run/netns/$space ]] || return 0
    ip netns add "$space"
    ip link add "$tag-$1" type veth peer name eth0 netns "$space"
    ip link set "$tag-$1" master "${tag}0" up
    ip -n "$space" addr add "$2/24" dev eth0
    ip -n "$space" link set eth0 up
    ip -n "$space" link set lo up
}

up() {
    local nodes=${1:-2} i
    install
    if ! is_alive "$dir/run/ctl.host"; then
        if [[ -n $(ip netns pids "$tag-ctl" 2>/dev/null) ]]; then
            echo "slurm.sh: a cluster of another folder runs here; end it with: $0 down" >&2
            return 1
        fi
        down
        write_config "$nodes"
    fi
    is_alive "$dir/run/munged.pid" || munged --force --key-file="$dir/munge.key" \
        --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" --num-threads=2
    if ! ip link show "${tag}0" >/dev/null 2>&1; then
        ip link add "${tag}0" type bridge
        ip link set "${tag}0" up
        ip addr add "$net.254/24" dev "${tag}0" # clients on the machine itself reach the nodes
    fi
    add_network ctl "$net.1"
    for i in $(seq "$nodes"); do add_network "node$i" "$net.$((10 + i))"; done
    start_host ctl "${tag}-ctl" slurmctld -D
    for i in $(seq "$nodes"); do start_node "node$i"; done
    for _ in $(seq 150); do
        if (($(sinfo --noheader --Node --states=idle,mix,alloc 2>/dev/null | wc -l) >= nodes)); then
            sinfo --Node --long
            return
        fi
        sleep 0.2
    done
    echo "slurm.sh: the nodes did not come up; see $dir/log" >&2
    return 1
}

down() {
    local path space
    for path in "$dir"/run/*.host; do
        [[ ! -e $path ]] || { path=${path##*/} && cut_host "${path%.host}"; }
    done
    if is_alive "$dir/run/munged.pid"; then kill "$(<"$dir/run/munged.pid")"; fi
    for space in $(ip netns list 2>/dev/null | awk '{print $1}' | grep "^$tag-" || true); do
        ip netns pids "$space" | xargs -r kill -9 || true # of a folder that is gone
        ip netns del "$space"
        rm -rf "/etc/netns/${space:?}"
    done
    if ip link show "${tag}0" >/dev/null 2>&1; then ip link del "${tag}0"; fi
    rm -rf "$dir"
}

kill_in() { # node, words, signal
    local space pid
    space=$(readlink "/proc/$(first_process "$1")/ns/pid")
    for pid in $(pgrep -f -- "$2"); do
        [[ $(readlink "/proc/$pid/ns/pid" || true) != "$space" ]] || kill -s "$3" "$pid" || true
    done
}

case ${1:-} in
    up) up "${2:-2}" ;;
    down) down ;;
    status) sinfo --Node --long && squeue ;;
    cut) cut_host "$2" ;;
    mend) start_node "$2" ;;
    kill) kill_in "$2" "$3" "${4:-KILL}" ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
