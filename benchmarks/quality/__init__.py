"""The quality study: what each part of the model brings (`python -m benchmarks.quality`)."""
