"""Storage used by all packages: URLs, atomically written files, signed manifests, and locks."""
