# shellcheck shell=bash
# Sourced by every job: where things are. All of it comes from the environment, nothing is written in here.
#
#   ADDIFF_HOME   the checkout                               (required)
#   ADDIFF_RUNS   where runs are kept, on a shared disk      (required)
#   ADDIFF_VENV   virtual environment                        (default: $ADDIFF_HOME/.venv)
#   ADDIFF_NAME   name of the run: its folder in ADDIFF_RUNS (default: the kind of job)
#   ADDIFF_SETUP  a file to source first, e.g. with "module load cuda" (default: none)

set -euo pipefail

: "${ADDIFF_HOME:?set ADDIFF_HOME to the checkout}"
: "${ADDIFF_RUNS:?set ADDIFF_RUNS to a folder on a shared disk}"
if [[ -n "${ADDIFF_SETUP:-}" ]]; then
    # shellcheck source=/dev/null
    source "$ADDIFF_SETUP"
fi
cd "$ADDIFF_HOME"
bin="${ADDIFF_VENV:-$ADDIFF_HOME/.venv}/bin"
export PATH="$bin:$PATH"
# As many threads as were allocated: libraries would otherwise take every core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# Since SLURM 22.05 srun no longer takes the job's --cpus-per-task over: a step would get one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
