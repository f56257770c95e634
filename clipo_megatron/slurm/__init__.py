"""`clipo submit`: runs, evaluations and conversions as Slurm jobs that go on by themselves when interrupted."""
