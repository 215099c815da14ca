"""Diagnose a training before, during and after its run: dataset, plan, cost, profile, report."""
