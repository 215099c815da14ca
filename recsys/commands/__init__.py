"""The commands of `recsys`: a module each, imported when its command runs.

A module has `add_arguments(parser, words)`, which adds the options to the command's parser, and
`run(arguments)`. Neither the module nor its top-level imports may import torch, so that help and
errors of arguments appear at once: `run` imports torch after the arguments are checked.
"""

# By name: the module in this package, and the command's line in `recsys --help`.
COMMANDS = {
    "doctor": ("doctor", "Print versions, devices and memory, and the fix of each problem."),
    "prepare": ("prepare", "Make a dataset from a known source, or the maps of its ids."),
    "explain-data": ("explain_data", "Describe a dataset, and what to fix in it before training."),
    "describe": ("describe", "Plan a run on any cluster: sizes, memory, sharding, time."),
    "cache": ("cache", "Fill the caches of item content that a model trains with."),
    "train": ("train", "Train a model from a recipe, whose settings are options, too."),
    "continual": (
        "continual",
        "Train on one partition after another, each scored before it is trained on.",
    ),
    "search": ("search", "Search settings: trials by Optuna, judged and pruned by validation."),
    "evaluate": ("evaluate", "Compute the metrics of a finished run on a split."),
    "predict": ("predict", "Add the predictions of a run to Parquet files of impressions."),
    "report": ("report", "Write an HTML page on a finished run."),
    "compare": ("compare", "Compare runs, and test which differences are significant."),
    "serve": ("serving.serve", "Answer requests from a package over HTTP and gRPC."),
    "export": ("export", "Write a run as a package that answers requests on its own."),
    "export-vectors": ("retrieval.export_vectors", "Write item vectors of a run, with an index."),
    "retrieve": ("retrieval.retrieve", "Find the best items of a user by an index of vectors."),
    "semantic-ids": ("retrieval.semantic_ids", "Give items a few codes that similar items share."),
    "package": ("serving.package", "Add items to a package, or compare files with their hashes."),
    "export-tables": ("export_tables", "Write the ID tables of a run to one Parquet file."),
}
