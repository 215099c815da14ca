"""The content branch: encoders, fusion, memory of items, and the user's content interest."""
