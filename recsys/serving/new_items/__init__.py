"""Items that are added to a package without training: encoded by its run's content branch."""
