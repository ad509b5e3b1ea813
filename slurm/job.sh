# What the job scripts beside this file share: the environment, and a training run that SLURM may end and start again.

fail() { echo "$SLURM_JOB_NAME: error: $*" >&2; exit 1; }

[ -f train_pl.py ] || fail "no train_pl.py in $PWD: give the sbatch command in the repository's folder"
eval "${ACTIVATE:-}" || fail "ACTIVATE ended with status $?: $ACTIVATE"
command -v python > /dev/null || fail "no python here: set ACTIVATE, as in export ACTIVATE='source ~/vae-env/bin/activate'"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export SLURM_EXPORT_ENV=ALL  # srun hands all that on, even in a job of sbatch --export=NONE

# TERM announces a preemption, after which SLURM requeues the job by itself, but only if it is still there to be killed.
trap : TERM

# Runs train_pl.py with these flags, one process per task, and ends as it does.
train() {
  srun --kill-on-bad-exit=1 python train_pl.py --dataset mnist "$@" &
  local status=1
  while kill -0 $! 2> /dev/null; do  # a signal ends wait, too
    wait $!
    status=$?
  done
  # Killed by USR1 (#SBATCH --signal), which announces the time limit, before train_pl.py could handle it.
  [ $status -ne 138 ] || fail "no epoch was finished within the time limit of" \
    "$(squeue -h -j "$SLURM_JOB_ID" -o %l), so the job is not requeued: give a longer --time"
  # Killed by TERM before it could ignore it. The job must not end by itself: a preempted one would not be requeued.
  [ $status -ne 143 ] || sleep 600
  exit $status
}
