"""Gain of the kernels of `recsys.kernels`: in single operations, and in whole training steps."""
