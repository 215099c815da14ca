"""Public systems (peers), trained and measured on the rows of our datasets."""
