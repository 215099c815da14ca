"""Training: begins or continues a run, takes its steps, and reports them."""
