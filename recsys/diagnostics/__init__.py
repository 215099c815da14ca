"""Diagnose training before, during and after a run: dataset, plan, profile, report."""
