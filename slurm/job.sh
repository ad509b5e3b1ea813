# Shared by the job scripts in this folder: sets up the environment, and defines `train`, a training run that SLURM may
# interrupt and restart.

fail() { echo "$SLURM_JOB_NAME: error: $*" >&2; exit 1; }

[ -f train_pl.py ] || fail "there is no train_pl.py in $PWD: give the sbatch command in the folder of the repository"
eval "${ACTIVATE:-}" || fail "ACTIVATE ended with status $?: $ACTIVATE (try this command in your shell)"
command -v python > /dev/null || \
  fail "python is not found: set ACTIVATE, for example export ACTIVATE='source ~/vae-env/bin/activate'"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export SLURM_EXPORT_ENV=ALL  # srun passes all variables on, even in a job of sbatch --export=NONE

# SLURM sends TERM before a preemption, and requeues the job afterwards, but only if the job runs until SLURM kills it.
# So TERM must not end this shell.
trap : TERM

# Runs train_pl.py with the given flags, one process per task, and exits with its status.
train() {
  srun --kill-on-bad-exit=1 python train_pl.py --dataset mnist "$@" &
  local status=1
  while kill -0 $! 2> /dev/null; do  # a signal ends `wait`, too
    wait $!
    status=$?
  done
  # Status 138: USR1 (the signal before the time limit, see #SBATCH --signal) ended the process before train_pl.py had
  # installed its handler.
  [ $status -ne 138 ] || fail "no epoch was finished within the time limit of" \
    "$(squeue -h -j "$SLURM_JOB_ID" -o %l), so the job is not requeued: give a longer --time"
  # Status 143: TERM ended the process before train_pl.py could ignore the signal. A preempted job must
  # not end by itself, or it is not requeued.
  [ $status -ne 143 ] || sleep 600
  exit $status
}
