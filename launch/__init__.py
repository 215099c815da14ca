"""Getting a job onto machines: installation, and components for torchx schedulers.

`install.py` makes the environment before anything is installed, so it uses the standard library
only; `components.py` is read by torchx, which runs it on a laptop, Slurm or Kubernetes alike.
"""
