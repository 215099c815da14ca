"""MovieLens as a dataset; the bundled sample is in the folder `sample`."""
