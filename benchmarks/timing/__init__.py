"""Timing of training steps on one or more ranks, in rounds, beside the machine's limits."""
