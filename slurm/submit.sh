#!/usr/bin/env bash
# Submit a job. Partition and the like come from the environment (see below), paths as slurm/common.sh says.
#
#   slurm/submit.sh train env=sd15 seed=1            one training
#   slurm/submit.sh sweep 8 env=tiny                 a search with 8 workers
#   slurm/submit.sh evaluate 16 agent=/path/to/agent 16 shards, then their merge
#   slurm/submit.sh ray rllib.num_env_runners=4      RLlib on ADDIFF_NODES nodes
#
#   ADDIFF_PARTITION  partition                      (required)
#   ADDIFF_ACCOUNT    account                        (default: your own)
#   ADDIFF_TIME       time limit                     (default: 24:00:00)
#   ADDIFF_GPUS       GPUs per node                  (default: 1; 0 for none)
#   ADDIFF_CPUS       CPU cores per task             (default: 8)
#   ADDIFF_MEM        memory per node                (default: 64G)
#   ADDIFF_NODES      nodes, for ray                 (default: 1)
#   ADDIFF_TRIALS     trainings per worker, for sweep (default: 8)
#   ADDIFF_TEST_ONLY  1: let sbatch check the job without queueing it
set -euo pipefail

usage() {
    sed -n '2,17p' "${BASH_SOURCE[0]}" | cut -c 3-
    exit "$1"
}
kind="${1:-}"
case "$kind" in # before anything that only a job needs
train | sweep | evaluate | ray) shift ;;
-h | --help) usage 0 ;;
*) usage 2 ;;
esac

ADDIFF_HOME="${ADDIFF_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export ADDIFF_HOME
: "${ADDIFF_RUNS:?set ADDIFF_RUNS to a folder on a shared disk}"
: "${ADDIFF_PARTITION:?set ADDIFF_PARTITION to a partition (see sinfo)}"
mkdir -p "$ADDIFF_RUNS/logs"

options=(
    --parsable
    "--partition=$ADDIFF_PARTITION"
    "--time=${ADDIFF_TIME:-24:00:00}"
    "--cpus-per-task=${ADDIFF_CPUS:-8}"
    "--mem=${ADDIFF_MEM:-64G}"
    "--export=ALL"
)
[[ -z "${ADDIFF_ACCOUNT:-}" ]] || options+=("--account=$ADDIFF_ACCOUNT")
[[ "${ADDIFF_TEST_ONLY:-0}" != 1 ]] || options+=(--test-only)
gpus=()
[[ "${ADDIFF_GPUS:-1}" == 0 ]] || gpus+=("--gpus-per-node=${ADDIFF_GPUS:-1}")

# submit <template> <more sbatch options ...> -- <arguments of the job ...>
submit() {
    local template="$1" more=()
    shift
    while [[ "$1" != -- ]]; do
        more+=("$1")
        shift
    done
    shift
    sbatch "${options[@]}" "${more[@]}" "$ADDIFF_HOME/slurm/$template.sbatch" "$@"
}

number_of_tasks() {
    [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || {
        echo "expected a number of array tasks after $kind, got '${1:-}'" >&2
        exit 2
    }
}

case "$kind" in
train)
    submit train "${gpus[@]}" "--output=$ADDIFF_RUNS/logs/%x-%j.out" -- "$@"
    ;;
sweep)
    number_of_tasks "${1:-}"
    submit sweep "${gpus[@]}" "--array=0-$(($1 - 1))" "--output=$ADDIFF_RUNS/logs/%x-%A_%a.out" -- "${@:2}"
    ;;
evaluate)
    number_of_tasks "${1:-}"
    export ADDIFF_SHARDS="$1"
    job="$(submit evaluate "${gpus[@]}" "--array=0-$(($1 - 1))" "--output=$ADDIFF_RUNS/logs/%x-%A_%a.out" -- "${@:2}")"
    after=()
    if [[ "${ADDIFF_TEST_ONLY:-0}" != 1 ]]; then # a check queues nothing to wait for
        echo "$job"
        # sbatch answers "<job>" or "<job>;<cluster>". Where a shard fails the merge goes, too: it would wait for ever.
        after+=("--dependency=afterok:${job%%;*}" --kill-on-invalid-dep=yes)
    fi
    submit merge "${gpus[@]}" "${after[@]}" "--output=$ADDIFF_RUNS/logs/%x-%j.out" -- "${@:2}"
    ;;
ray)
    submit ray "${gpus[@]}" "--nodes=${ADDIFF_NODES:-1}" "--output=$ADDIFF_RUNS/logs/%x-%j.out" -- "$@"
    ;;
esac
