#!/bin/bash
# GRPO on 2 nodes of 4 GPUs each, one torchrun a node: sbatch configs/cluster/slurm.sh, from the repository's root on a
# disk that all nodes mount. The job's number names the run: requeued (a node is gone, or its time is up), the job goes
# on from its newest checkpoint. docs/multi-node.md explains the rest.
#SBATCH --job-name=grpo-gsm8k
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --kill-on-bad-exit: should one torchrun give up, the others have nobody to wait for.
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=4 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29400" --rdzv-id="$SLURM_JOB_ID" \
    scripts/grpo.py configs/grpo_gsm8k_gpu.yaml \
    rollout.tensor_parallel_size=1 rollout.balance=true \
    run.name="grpo-gsm8k-$SLURM_JOB_ID" run.progress=false checkpoint.every=10 checkpoint.resume=auto
