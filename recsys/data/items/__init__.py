"""Read the items: their texts, images and features, prepared once and cached on disk."""
