"""Modality kinds of the package, one file each; `recsys.data.items.kind` says how to add one."""
