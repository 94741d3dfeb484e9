#!/usr/bin/env bash
# Runs a recipe on the machines of a Slurm job: Ray's head on the first, a worker on each, and `unclip run` beside the head.
# Run it again to continue. The tree, its .venv and the workspace must be on storage that all machines share.
#
#   sbatch --nodes=4 --gpus-per-node=8 deploy/slurm.sh configs/my.toml [--until STEP ...]
#
# Variables: UNCLIP_ROOT is the tree (default: where sbatch is called), RAY_PORT the head's port (6379), SLURM_TMPDIR a folder
# on each machine's own disk (below /tmp).
#SBATCH --job-name=unclip
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

recipe=${1:?"say which recipe"}
root=${UNCLIP_ROOT:-$SLURM_SUBMIT_DIR}
port=${RAY_PORT:-6379}
bin=$root/.venv/bin
export PATH=$bin:$PATH RAY_USAGE_STATS_ENABLED=0

# Machines of a cluster are seldom alone in their network: all of Ray asks for a token, which this job's user alone can read.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$root/.ray-token-$SLURM_JOB_ID
(umask 077 && head -c 32 /dev/urandom | base64 >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# The machine's own disk, for the cache of an object store and for what Ray spills.
local=${SLURM_TMPDIR:-/tmp/unclip-$SLURM_JOB_ID}
export UNCLIP_CACHE=$local/cache
mkdir_local=(srun --overlap --ntasks-per-node=1 mkdir -p "$local/cache" "$local/spill")
"${mkdir_local[@]}"

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
disk_gb=$(df --block-size=GB --output=avail "$local" | tail -n 1 | tr -d " ")
common=(--block --resources="{\"disk_gb\": $disk_gb}" --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" --object-spilling-directory="$local/spill")

start() { # its machine, then the options of `ray start`
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" ray start "${common[@]}" "${@:2}" &
}
start "$head" --head --port="$port" --node-ip-address="$address" --dashboard-host=127.0.0.1
head_start=$! deadline=$((SECONDS + 300))
until ray health-check --address "$address:$port" >/dev/null 2>&1; do
    sleep 2
    # Without a head, all machines would idle until --time.
    if ! kill -0 "$head_start" 2>/dev/null || ((SECONDS > deadline)); then
        echo "Ray's head did not start on $head at $address:$port; another port: RAY_PORT=6380 sbatch ..." >&2
        exit 4
    fi
done
for machine in "${machines[@]:1}"; do
    start "$machine" --address="$address:$port"
done

# Slurm's warning before the end goes to the run, which keeps what is finished.
unclip run "$recipe" --address "$address:$port" "${@:2}" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
wait "$run" 2>/dev/null || code=$?
exit "$code"
