#!/usr/bin/env bash
# A run on a SLURM cluster, as one SLURM job: Ray on every node of the allocation, the run on the first (docs/cluster.md).
#
#   cd CHECKOUT && sbatch examples/cluster/slurm.sh CONFIG [key=value ...]
#
# CHECKOUT is on storage that all nodes share, with the .venv of `make setup`. Before the time limit the run saves a checkpoint and ends, the
# job is queued again, and then goes on from there. `scancel --signal=TERM --batch JOB` does the same at any moment.
#SBATCH --job-name=videoseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH
run=$PWD/runs/slurm-$SLURM_JOB_ID # the same when the job was queued again

# A token of this job's own: other users of these machines must not be able to talk to its Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

head=$(hostname -I | cut -d ' ' -f 1) # where nodes have several networks, choose the address that the others reach
step=(srun --overlap --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpus-per-node="${SLURM_GPUS_PER_NODE:-0}")
"${step[@]}" --nodes=1 --nodelist="$SLURMD_NODENAME" examples/cluster/node.sh head "$head" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # shellcheck disable=SC2016 # each node asks for its own address
    "${step[@]}" --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$SLURMD_NODENAME" \
        bash -c 'exec examples/cluster/node.sh worker "$0" "$(hostname -I | cut -d " " -f 1)"' "$head" &
fi
export RAY_ADDRESS=$head:6379
until [ "$(python -c 'import ray; ray.init(logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))' 2>/dev/null)" = "$SLURM_JOB_NUM_NODES" ]; do sleep 5; done

if [ -e "$run/config.yaml" ]; then
    videoseg resume "$run" &
else
    videoseg train "$@" run.dir="$PWD/runs" run.name="slurm-$SLURM_JOB_ID" &
fi
main=$! stopped=
trap 'stopped=yes; kill -TERM $main' TERM
status=0
wait $main || status=$?
while kill -0 $main 2>/dev/null; do status=0; wait $main || status=$?; done # a signal interrupts `wait`, not the run
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit $status
