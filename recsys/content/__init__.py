"""The content branch: encoders, fusion, memory bank of items, and the user's content interest."""
