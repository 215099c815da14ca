"""What a training step costs: FLOPs, bytes and the least time they take, by part."""
