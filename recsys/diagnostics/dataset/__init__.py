"""`recsys explain-data`: what is in a dataset, and what to mend in it, before any training."""
