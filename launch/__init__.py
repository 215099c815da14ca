"""Installation, and torchx components that run jobs on one machine, Slurm or Kubernetes.

`install.py` runs before anything is installed, so it uses the standard library only; torchx reads
`components.py`.
"""
