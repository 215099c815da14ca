"""Continual training: one partition after another, each scored before it is trained on."""
