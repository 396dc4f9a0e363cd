#!/bin/bash
# A job of Slurm that saves before its time is up, and is queued again until it is done:
#
#   sbatch --gpus-per-node=8 --cpus-per-task=64 scripts/slurm.sh output_dir=/shared/run model=llama3_8b
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 scripts/slurm.sh output_dir=/shared/run model=llama3_70b
#   sbatch --array=1-4 --gpus-per-node=1 scripts/slurm.sh output_dir=/shared/run-%a seed=%a model=llama3_8b
#
# One task is one machine: llmtune starts the ranks of its GPUs itself, with restarts and the ladder. Several are one rank each,
# started by srun. In an array, %a is the task's number in every argument. Options of sbatch win over the lines below; PYTHON
# names the interpreter.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

# Starts in a row that may end without a new checkpoint: what is killed for the same reason each time is not queued for ever.
most_in_vain=3

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
fi
run=
for argument in "$@"; do
    case $argument in output_dir=*) run=${argument#output_dir=} ;; esac
done
if [ -z "$run" ]; then
    echo "slurm.sh: output_dir=FOLDER is missing; all nodes and all later starts must see it" >&2
    exit 2
fi
run=${run/#\~\//$HOME/}
# Beside the run folder, which is to hold a run and nothing else.
in_vain_file=${run%/}.slurm-starts-in-vain

newest_checkpoint() {
    find "$run" -mindepth 2 -maxdepth 2 -path '*/checkpoint-*/COMPLETE' 2>/dev/null | sort -V | tail -n 1
}

command=("${PYTHON:-python}" -m llmtune)
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    command=(srun --kill-on-bad-exit=1 "${command[@]}")
    # Since Slurm 22.05 srun does not take it from sbatch: each rank would have one core.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
fi

before=$(newest_checkpoint)
# In the background, for bash looks at signals only between two commands, and in wait.
"${command[@]}" "$@" &
job=$!
asked=
trap 'caught=yes; asked=${asked:-USR1}; kill -USR1 "$job" 2>/dev/null' USR1
trap 'caught=yes; asked=${asked:-TERM}; kill -TERM "$job" 2>/dev/null' TERM
code=127
while :; do
    caught=
    wait "$job"
    status=$?
    # 127: the job had been waited for when the signal came.
    [ "$status" -eq 127 ] || code=$status
    [ -n "$caught" ] || break
done

# 75: stopped and saved. 137, 143: killed, or ended by srun because another task had ended first. 138: asked to stop while Python
# itself was starting.
case $code in
75 | 137 | 138 | 143) ;;
*)
    rm -f "$in_vain_file"
    exit "$code"
    ;;
esac
if [ "$asked" = TERM ]; then
    rm -f "$in_vain_file"
    echo "slurm.sh: ended by Slurm (scancel, or preemption, after which Slurm itself queues it again); exit code $code" >&2
    exit "$code"
fi
in_vain=0
# Memory that ran out is progress: the next start takes the next rung.
if [ "$(newest_checkpoint)" = "$before" ] && ! compgen -G "$run/.out-of-memory-*.json" >/dev/null; then
    read -r in_vain 2>/dev/null <"$in_vain_file"
    in_vain=$((in_vain + 1))
fi
if [ "$in_vain" -ge "$most_in_vain" ]; then
    echo "slurm.sh: not queued again, for $in_vain starts in a row ended without a new checkpoint (the last with exit code $code)" >&2
    rm -f "$in_vain_file"
    exit "$code"
fi
if ! echo "$in_vain" >"$in_vain_file"; then
    echo "slurm.sh: not queued again, for $in_vain_file cannot be written" >&2
    exit "$code"
fi
echo "slurm.sh: exit code $code, queued again"
scontrol requeue "$SLURM_JOB_ID"
