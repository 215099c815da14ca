"""Shows what to look at before, during and after training: dataset, plan, cost, profile, report."""
