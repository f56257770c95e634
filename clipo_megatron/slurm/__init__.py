"""`clipo submit` and `clipo scale`: runs as Slurm jobs that continue by themselves when interrupted."""
