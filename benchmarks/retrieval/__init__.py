"""Speed and recall of indexes of item vectors."""
