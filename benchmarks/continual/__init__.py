"""Quality of continual training beside alternatives on one log, and the time of a partition."""
