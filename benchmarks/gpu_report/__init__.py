"""A report on a machine with a GPU: doctor, tests, waits and speed, in pieces of ten minutes."""
