"""Search over settings: Optuna proposes trials, and `recsys train` trains and validates them."""
