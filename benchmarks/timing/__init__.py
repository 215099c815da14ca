"""Times training steps on one or more ranks, in rounds, beside what the machine can do."""
