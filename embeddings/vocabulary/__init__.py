"""Raw ids to rows of a table: by a fixed map, by hashing, or by a map that learns while training.

`fixed` holds what is known before training (`ExactVocabulary`, `HashVocabulary`), `bounded` the map
that admits frequent ids and takes rows back (`BoundedVocabulary`), `row_sets` its sets of rows.
"""

from embeddings.vocabulary.bounded import BoundedVocabulary
from embeddings.vocabulary.fixed import ExactVocabulary, HashVocabulary

__all__ = ["BoundedVocabulary", "ExactVocabulary", "HashVocabulary"]
