"""Features that a scorer looks up by the ids of a request."""
