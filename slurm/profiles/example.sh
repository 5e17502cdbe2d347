# A cluster's profile: what differs between sites, and nothing else. Copy it to a name of your own and choose it by
# MEGATRAIN_PROFILE=<name or path> or launch.profile=<name or path>. It is read twice: by the shell that submits (options
# of sbatch) and inside the job, by slurm/train.sbatch (all the rest). Every line is optional.
#
#   source slurm/profiles/mysite.sh && sbatch --nodes=4 slurm/train.sbatch model=llama_1b
#   megatrain train launch=slurm launch.profile=mysite launch.num_nodes=4 model=llama_1b

# ---- before submission: every option of sbatch that has a variable (man sbatch, INPUT ENVIRONMENT VARIABLES)
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project123
# export SBATCH_TIMELIMIT=1-00:00:00
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_EXCLUSIVE=exclusive     # whole nodes; or give sbatch --cpus-per-task, or each agent gets one core
# --nodes, --cpus-per-task, --mem and --mail-type have none: give them on the command line (launch.sbatch_options).
# export MEGATRAIN_PROFILE=$(realpath "${BASH_SOURCE[0]}")

# ---- inside the job
# MEGATRAIN_RANKS_PER_NODE=8            # unset: one a GPU that Slurm gave the node
# MEGATRAIN_INTERFACE=ib0               # NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: the network between nodes (ip address)
# MEGATRAIN_PYTHON=/path/to/venv/bin/python
# megatrain_setup() {                   # runs on the first node, its environment goes to all
#   module load cuda/12.8
#   source /path/to/venv/bin/activate
#   export MLFLOW_TRACKING_URI=http://mlflow:5000   # a server that compute nodes reach; unset: runs/mlflow.db
#   export MLFLOW_DISABLE_TELEMETRY=true            # no internet: MLflow does not report its use
#   export HF_HOME=/scratch/huggingface             # a cache of the Hugging Face hub that all nodes share
#   export HF_HUB_OFFLINE=1                         # no internet: only that cache is read
#   export NCCL_IB_HCA=mlx5                         # InfiniBand, RoCE: only adapters whose name begins so (ibv_devices)
#   export NCCL_IB_GID_INDEX=3                      # RoCE, if NCCL chooses the wrong one: show_gids lists them
#   export FI_PROVIDER=efa                          # AWS EFA, by the aws-ofi-nccl plugin (libnccl-net.so), which is in:
#   export LD_LIBRARY_PATH=/path/to/ofi-nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# }
# WRAPPER=(apptainer exec --nv --bind /scratch /path/to/image.sif)
# SRUN_OPTIONS=(--container-image=/path/to/image.sqsh --container-mounts=/scratch)
