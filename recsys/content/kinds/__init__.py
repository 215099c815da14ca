"""Modality kinds of the package, one file each; see `recsys.data.items.kind` on how to add one."""
