"""Installation, and torchx components that run jobs on one machine, Slurm or Kubernetes."""
