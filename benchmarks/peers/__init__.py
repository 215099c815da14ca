"""The field's own programs on the rows of our datasets."""
