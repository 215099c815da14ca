"""`recsys describe`: what a run would be, before any training and on any cluster."""
