"""Map raw ids to rows of a table: by a fixed map, by hashing, or by a map learned in training.

`fixed` has the maps that exist before training (`ExactVocabulary`, `HashVocabulary`), `bounded` the
map that admits frequent and evicts rare ids (`BoundedVocabulary`), `row_sets` its sets of rows,
`resized` the places of its ids in a table of another size.
"""
