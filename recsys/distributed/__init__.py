"""Ranks of a job: join them, keep them in step, end them. Shapes: N rows, D dimension."""
