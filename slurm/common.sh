# shellcheck shell=bash
# Sourced by every job: where things are. All of it comes from the environment, nothing is written in here.
#
#   ADDIFF_HOME   the checkout                               (required)
#   ADDIFF_RUNS   where runs are kept, on a shared disk      (required)
#   ADDIFF_VENV   virtual environment                        (default: $ADDIFF_HOME/.venv)
#   ADDIFF_NAME   name of the run: its folder in ADDIFF_RUNS (default: the kind of job; of
#                 trainings: their preset and seed)
#   ADDIFF_SETUP  a file to source first, e.g. with "module load cuda" (default: none)

set -euo pipefail

: "${ADDIFF_HOME:?set ADDIFF_HOME to the checkout}"
: "${ADDIFF_RUNS:?set ADDIFF_RUNS to a folder on a shared disk}"
if [[ -n "${ADDIFF_SETUP:-}" ]]; then
    [[ -r "$ADDIFF_SETUP" ]] || { echo "ADDIFF_SETUP: cannot read $ADDIFF_SETUP" >&2 && exit 1; }
    set +eu # module and conda scripts read variables that are not set
    # shellcheck source=/dev/null
    source "$ADDIFF_SETUP"
    set -euo pipefail
fi
cd "$ADDIFF_HOME"
bin="${ADDIFF_VENV:-$ADDIFF_HOME/.venv}/bin"
export PATH="$bin:$PATH"
# As many threads as were allocated: libraries would otherwise take every core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# Since SLURM 22.05 srun no longer takes the job's --cpus-per-task over: a step would get one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# hydra_value <text>: the text as a value that Hydra reads back, quoted where its grammar needs that. A ${...} in it is
# still filled in by Hydra.
hydra_value() {
    # shellcheck disable=SC2016 # a pattern: nothing in it is to be filled in
    local plain='^[A-Za-z0-9_./:+@%${}-]+$' quote="'"
    if [[ "$1" =~ $plain ]]; then
        printf '%s' "$1"
    else
        printf "'%s'" "${1//$quote/\\$quote}"
    fi
}

# run_step <command ...>: run it as a step. Shortly before the time limit SLURM sends USR1 (#SBATCH --signal), and the
# job queues itself again: what was made stays, and the same command goes on from there.
run_step() {
    local step status job="${SLURM_JOB_ID:?not inside a SLURM job}"
    if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then # one task's SLURM_JOB_ID is the whole array's
        job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:?}"
    fi
    # shellcheck disable=SC2064 # filled in now: the signal may come when the function and its variables are gone
    trap "signalled=1; scontrol requeue $job" USR1
    srun "$@" &
    step="$!"
    signalled=1
    while ((signalled)); do # a signal ends the waiting, not the step, whose own status the next wait tells
        signalled=0 status=0
        wait "$step" || status="$?"
    done
    return "$status"
}
