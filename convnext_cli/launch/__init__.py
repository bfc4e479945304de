"""Processes elsewhere: the sbatch file, torchrun, and who starts again after which exit code."""
