"""Parts of models in which the items of a history attend to each other."""
