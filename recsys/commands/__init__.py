"""The commands of `recsys`: each is a function whose signature and docstring define its options.

A command's module does not import torch, so that help and argument errors appear at once. Functions
import torch after they check their arguments.
"""

# By name: the function, and the command's line in `recsys --help`.
COMMANDS = {
    "doctor": ("recsys.doctor:main", "Print versions, devices and memory, and fixes of problems."),
    "prepare events": ("datasets:prepare_events", "Make a dataset of event logs."),
    "prepare movielens": ("datasets:prepare_movielens", "Make a dataset of MovieLens."),
    "prepare vocabulary": ("datasets:prepare_vocabulary", "Write the maps of raw ids."),
    "prepare transforms": ("datasets:prepare_transforms", "Fit the transforms of columns."),
    "explain-data": ("datasets:explain_data", "Describe a dataset, and what to fix in it."),
    "describe": ("training:describe", "Plan a run on any cluster: sizes, memory, sharding."),
    "cache": ("training:cache", "Fill the caches of item content that a model trains with."),
    "train": ("training:train", "Train a model from a recipe, whose settings are options, too."),
    "continual": ("training:continual", "Train on partitions in time, each scored before."),
    "search": ("training:search", "Search settings: trials by Optuna, pruned by validation."),
    "evaluate": ("finished_runs:evaluate", "Compute the metrics of a finished run on a split."),
    "predict": ("finished_runs:predict", "Add the predictions of a run to Parquet files."),
    "report": ("finished_runs:report", "Write an HTML page on a finished run."),
    "compare": ("finished_runs:compare", "Compare runs, and test which differences count."),
    "export-tables": ("finished_runs:export_tables", "Write the ID tables of a run as Parquet."),
    "export": ("packages:export", "Write a run as a package that answers requests on its own."),
    "serve": ("packages:serve", "Answer requests from a package over HTTP and gRPC."),
    "package add-items": ("packages:package_add_items", "Put new items into a package."),
    "package verify": ("packages:package_verify", "Compare a package's files with their hashes."),
    "package features": ("packages:package_features", "Write a package with later features."),
    "package delta": ("packages:package_delta", "Write what differs between two packages."),
    "package apply": ("packages:package_apply", "Make the newer package of a delta."),
    "export-vectors": ("packages:export_vectors", "Write item vectors of a run, with an index."),
    "retrieve": ("packages:retrieve", "Find the best items of a user by an index of vectors."),
    "baselines": ("packages:baselines", "Compare a retrieval model with item-CF and its like."),
    "semantic-ids": ("packages:semantic_ids", "Give items a few codes that similar items share."),
    "push": ("hub:push", "Send a run or a package to the Hugging Face Hub."),
    "pull": ("hub:pull", "Fetch a run or a package from the Hugging Face Hub."),
    "completion": ("options:completion", "Print a script that completes commands in a shell."),
}
