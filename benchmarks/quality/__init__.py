"""The quality study: the gain of each part of the model (`python -m benchmarks.quality`)."""
