"""Map raw ids to rows of a table: by a fixed map, by hashing, or by a map learned while training.

`fixed` holds the maps known before training (`ExactVocabulary`, `HashVocabulary`), `bounded` the
map that admits frequent and evicts rare ids (`BoundedVocabulary`), `row_sets` its sets of rows.
"""
