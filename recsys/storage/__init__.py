"""Storage below all rooms: URLs, files that appear whole, signed manifests, and locks."""
