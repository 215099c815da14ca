"""Training: begin or continue a run, take its steps, and report them."""
