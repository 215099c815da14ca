"""Diagnoses a training before, while and after it runs: dataset, plan, cost, profile, report."""
