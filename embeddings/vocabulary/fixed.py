"""Vocabularies for 64-bit integer or string ids. Shapes: N ids, K hash functions."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

# The increment of splitmix64, 2^64 divided by the golden ratio.
GOLDEN = 0x9E3779B97F4A7C15
# Integer that stands for null among raw ids; any constant that is unlikely to be an id.
NULL_ID = GOLDEN - 2**64
FEW_IDS = 1024  # with fewer ids, deduplication costs more time than it saves


def mix64(keys: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers [N] with the finaliser of splitmix64, a bijection: uint64 [N]."""
    mixed = keys.astype(np.uint64) + np.uint64(GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def is_id_type(kind: pa.DataType) -> bool:
    """Return whether values of this type can be raw ids: integers or strings of any width."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind)) or _is_string(kind)


def _is_string(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _plain_ids(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not is_id_type(ids.type):
        raise ValueError(f"ids of type {ids.type}; ids are integers or strings")
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if ids.null_count:
        index = int(np.flatnonzero(ids.is_null().to_numpy(False))[0])
        raise ValueError(f"id number {index} is null; fill it or leave it out")
    if _is_string(ids.type):
        return ids.cast(pa.large_string())
    try:
        return ids.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"an id does not fit a signed 64-bit integer ({error})") from error


def _keys(plain: pa.Array) -> np.ndarray:
    """Return int64 keys [N]: integers as they are, strings by 64 bits of BLAKE2b."""
    if pa.types.is_integer(plain.type):
        return np.asarray(plain.to_numpy(zero_copy_only=False))
    if len(plain) < FEW_IDS:
        return _fingerprints(plain)
    encoded = plain.dictionary_encode()  # each distinct string is hashed once
    keys: np.ndarray = _fingerprints(encoded.dictionary)[encoded.indices.to_numpy()]
    return keys


def _fingerprints(texts: pa.Array) -> np.ndarray:  # [N] -> int64 [N]
    encoded = texts.cast(pa.large_binary()).to_pylist()
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in encoded]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def integer_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return raw ids as int64 [N], strings as fingerprints; a ValueError for other ids or null."""
    return _keys(_plain_ids(ids))


class ExactVocabulary:
    """A map from raw ids to rows, built from data and stored as Parquet; it never drops an id.

    It holds up to ``num_embeddings - 1`` ids in order of arrival; others map to the last row.

    Example::

        import pyarrow as pa
        from embeddings import ExactVocabulary

        vocabulary = ExactVocabulary(num_embeddings=4)
        vocabulary.extend([pa.array(["ann", "bob"]), pa.array(["bob", "eve"])])  # 3 new ids
        vocabulary.rows_of(pa.array(["eve", "joe"]))  # [2, 3]; 3 is unknown_row
    """

    is_limited = True  # whether more than `num_embeddings - 1` ids are an error

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = check_num_embeddings(num_embeddings)
        self.ids = pa.array([], pa.int64())  # in order of row
        self._ordered_keys = np.zeros(0, np.int64)
        self._ordered_rows = np.zeros(0, np.int64)  # row of each ordered key

    @property
    def unknown_row(self) -> int:
        return self.num_embeddings - 1

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, chunks: Iterable[pa.Array | pa.ChunkedArray]) -> int:
        """Add the new ids of chunks and return their number; a ValueError if they do not fit."""
        saved = self.ids, self._ordered_keys, self._ordered_rows
        try:
            for chunk in chunks:
                self._add(_plain_ids(chunk))
            if self.is_limited and len(self) > self.unknown_row:
                raise ValueError(
                    f"{len(self)} ids do not fit: num_embeddings is {self.num_embeddings}, and "
                    f"the last row is that of unknown ids; set it to at least {len(self) + 1}"
                )
        except Exception:
            self.ids, self._ordered_keys, self._ordered_rows = saved
            raise
        return len(self) - len(saved[0])

    def _add(self, ids: pa.Array) -> None:
        ids = pc.unique(ids)
        new_ids = ids.filter(pa.array(self.find(ids) < 0))
        if not len(new_ids):
            return
        keys = _keys(new_ids)
        order = np.argsort(keys)
        positions = np.searchsorted(self._ordered_keys, keys[order], side="right")
        self._ordered_keys = np.insert(self._ordered_keys, positions, keys[order])
        self._ordered_rows = np.insert(self._ordered_rows, positions, len(self) + order)
        self.ids = pa.concat_arrays([self.ids, new_ids]) if len(self) else new_ids
        collisions = np.flatnonzero(np.diff(self._ordered_keys) == 0)
        if len(collisions):
            pair = self._ordered_rows[collisions[0] : collisions[0] + 2]
            first, second = (self.ids[int(row)].as_py() for row in pair)
            raise ValueError(f"ids '{first}' and '{second}' have one fingerprint; rename one")

    def check_type(self, kind: pa.DataType) -> None:
        """Raise a ValueError if ids of this Arrow type cannot be in the map."""
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if len(self) and _is_string(kind) != _is_string(self.ids.type):
            name = "strings" if _is_string(self.ids.type) else "integers"
            raise ValueError(
                f"the map holds {name}, these ids are {kind}; write them with one type"
            )

    def find(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Return the rows of raw ids: int64 [N], -1 for unknown ids; a null is a ValueError."""
        ids = _plain_ids(ids)
        if not len(self) or not len(ids):
            return np.full(len(ids), -1)
        self.check_type(ids.type)
        keys = _keys(ids)
        if len(keys) < FEW_IDS:
            positions = np.searchsorted(self._ordered_keys, keys)
        else:
            distinct, inverse = np.unique(keys, return_inverse=True)  # the search is 5 x as fast
            positions = np.searchsorted(self._ordered_keys, distinct)[inverse]
        positions[positions == len(self)] = 0
        is_known = self._ordered_keys[positions] == keys
        rows = self._ordered_rows[positions]
        if not pa.types.is_integer(ids.type):  # an unknown string may have a known fingerprint
            is_known &= pc.equal(self.ids.take(pa.array(rows)), ids).to_numpy(False)
        return np.where(is_known, rows, -1)

    def rows_of(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Return the rows of raw ids: int64 [N], ``unknown_row`` for unknown ids."""
        rows = self.find(ids)
        return np.where(rows < 0, self.unknown_row, rows)

    def is_extension_of(self, other: "ExactVocabulary") -> bool:
        return len(other) == 0 or self.ids.slice(0, len(other)).equals(other.ids)

    def resized(self, num_embeddings: int) -> "ExactVocabulary":
        """Return the map for a table of another size, without the last ids if they do not fit."""
        resized = ExactVocabulary(num_embeddings)
        if len(self) <= resized.unknown_row:
            resized.ids, resized._ordered_keys = self.ids, self._ordered_keys
            resized._ordered_rows = self._ordered_rows
        else:
            resized.extend([self.ids.slice(0, resized.unknown_row)])
        return resized

    def save(self, path: str, filesystem: FileSystem | None = None) -> None:
        table = pa.table({"id": self.ids, "row": np.arange(len(self))})
        pq.write_table(table, path, filesystem=filesystem)

    @staticmethod
    def load(
        path: str, num_embeddings: int, filesystem: FileSystem | None = None
    ) -> "ExactVocabulary":
        """Read a map written by :meth:`save`; a ValueError if it does not fit the table."""
        try:
            table = pq.read_table(path, filesystem=filesystem, columns=["id", "row"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable vocabulary ({error})") from error
        table = table.sort_by("row")
        if not np.array_equal(table["row"].to_numpy(), np.arange(table.num_rows)):
            raise ValueError(f"{path}: its rows are not 0, 1, 2 ... each once; write it anew")
        vocabulary = ExactVocabulary(num_embeddings)
        try:
            num_ids = vocabulary.extend([table["id"]])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if num_ids != table.num_rows:
            raise ValueError(f"{path}: an id has several rows; write it anew")
        return vocabulary


class HashVocabulary:
    """Maps an id to rows by K hash functions; two ids share all rows with probability ``n ** -K``.

    Hashing trick with several functions: arXiv 1709.03933.

    Example::

        import pyarrow as pa
        from embeddings import HashVocabulary

        HashVocabulary(num_embeddings=1000, num_hashes=2).rows_of(pa.array([7]))  # shape [1, 2]
    """

    def __init__(self, num_embeddings: int, num_hashes: int = 1, seed: int = 0) -> None:
        for name, value in [("num_embeddings", num_embeddings), ("num_hashes", num_hashes)]:
            if value < 1:
                raise ValueError(f"{name} is {value}; set at least 1")
        self.num_embeddings, self.num_hashes = num_embeddings, num_hashes
        # Mixing the seed first keeps adjacent seeds from sharing hash functions.
        self._offsets = mix64(mix64(np.array([seed])) + np.arange(num_hashes, dtype=np.uint64))

    def rows_of(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Return the rows of raw ids: int64 [N, K]."""
        keys = integer_ids(ids).astype(np.uint64)
        hashes = mix64(keys[:, None] ^ self._offsets[None, :])
        return (hashes % np.uint64(self.num_embeddings)).astype(np.int64)


def check_num_embeddings(num_embeddings: int) -> int:
    """Return `num_embeddings`; below 2, a ValueError, as the last row is that of unknown ids."""
    if num_embeddings < 2:
        raise ValueError(
            f"num_embeddings is {num_embeddings}; set at least 2, as the last row is that of "
            "unknown ids"
        )
    return num_embeddings
