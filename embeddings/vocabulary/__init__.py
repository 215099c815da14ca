"""Maps of raw ids to rows of a table: fixed, by hashing, or learned in training."""
