"""What the kernels of `recsys.kernels` gain: in single operations, and in whole training steps."""
