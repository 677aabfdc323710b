#!/bin/sh
# A Slurm array: every task is one worker of the sweep, with one GPU. Submit it with
#   sbatch examples/sweep_slurm.sh experiments/paper/roberta-rte.yaml postgresql+psycopg://user@host/sweeps
# The array may be of any length, and may be submitted again at any time: a task ends when all runs are done.
#SBATCH --job-name=hiddenkey-sweep
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --output=sweep-%A-%a.log

# SIGTERM, which Slurm sends a minute before the time is up, makes the worker give its run back.
exec srun hiddenkey sweep "$1" --worker --storage "$2"
