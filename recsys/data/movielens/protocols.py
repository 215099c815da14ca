"""Protocols that split ratings into train, valid and test rows, and the history of a row.

Three protocols, with one rule at every cut: it lies at a quantile of timestamps
(`numpy.quantile(..., method="lower")`), and the ratings of that moment come before it. So a moment
is never cut in two. In all of them a row's history is its user's last ratings with a STRICTLY
smaller timestamp, from any split: no rating leaks from the row's own second.

Time-ordered splits and their leaks: Ji et al., A Critical Study on Data Leakage in Recommender
System Offline Evaluation (arXiv 2010.11060).

Shapes: N ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

LIKED_FROM = 4.0
UNTIL = (0.8, 0.9)  # quantiles of time at which train and valid end
NUM_WINDOWS = 5  # of `rolling`; the test windows are tenths, and the last ends with the data

SplitProtocol = Literal["global", "user", "rolling"]
Splits = dict[str, np.ndarray]  # train, valid, test -> rows, int64, ascending


@dataclass(frozen=True)
class Ratings:
    """All ratings, ordered by user, then timestamp, then item.

    The history of rating n is the slice `[history_begin[n], history_end[n])` of the same arrays.
    """

    user: np.ndarray  # int32 [N], dense
    item: np.ndarray  # int32 [N], row of the items file
    stars: np.ndarray  # float32 [N], 0.5 to 5
    timestamp: np.ndarray  # int64 [N], seconds
    history_begin: np.ndarray  # int64 [N]
    history_end: np.ndarray  # int64 [N]


def liked(
    stars: np.ndarray,  # [N], float
) -> np.ndarray:  # [N], float32
    """Return 1 for ratings of `LIKED_FROM` stars or more, else 0."""
    return (stars >= LIKED_FROM).astype(np.float32)


def sorted_ratings(table: pa.Table, history_length: int) -> Ratings:
    """Return ratings in order, with their histories.

    Args:
        table: columns userId, item, rating and timestamp; N rows in any order.
        history_length: longest history of a rating.
    """
    user = np.unique(table["userId"].to_numpy(), return_inverse=True)[1]
    item, timestamp = table["item"].to_numpy(), table["timestamp"].to_numpy()
    order = np.lexsort((item, timestamp, user))
    user, timestamp = user[order].astype(np.int32), timestamp[order]
    stars = table["rating"].to_numpy()[order].astype(np.float32)
    begin, end = history_ranges(user, timestamp, history_length)
    return Ratings(user, item[order].astype(np.int32), stars, timestamp, begin, end)


def history_ranges(
    user: np.ndarray, timestamp: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Locate each rating's history among ratings ordered by user and timestamp.

    Args:
        user: int [N], ascending.
        timestamp: int [N], ascending within a user.
        length: longest history.

    Returns:
        begin and end, int64 [N] each: the last `length` ratings of the same user with a strictly
        smaller timestamp are `[begin, end)`.
    """
    position = np.arange(len(user))
    new_user = np.ones(len(user), dtype=bool)
    new_user[1:] = user[1:] != user[:-1]
    new_moment = new_user.copy()
    new_moment[1:] |= timestamp[1:] != timestamp[:-1]
    user_begin = np.maximum.accumulate(np.where(new_user, position, 0))
    end = np.maximum.accumulate(np.where(new_moment, position, 0))
    return np.maximum(user_begin, end - min(length, len(user))), end


def split_ratings(ratings: Ratings, protocol: SplitProtocol) -> dict[str, Splits]:
    """Return the splits of each dataset that a protocol makes.

    Args:
        ratings: in their order.
        protocol: `global` (`split_by_time`), `user` (`split_each_user`) or `rolling`
            (`split_rolling`).

    Returns:
        Splits by the dataset's folder; the only dataset of a protocol has the empty name.

    Raises:
        ValueError: the protocol is not known, or a split would be empty.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"split is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](ratings)


def split_by_time(timestamp: np.ndarray) -> Splits:
    """Split all users at once in time: train, valid and test end at quantiles 0.8, 0.9 and 1.

    Args:
        timestamp: int64 [N], in any order.

    Raises:
        ValueError: a split would be empty.
    """
    return _between_quantiles(timestamp, (*UNTIL, 1.0))


def split_rolling(timestamp: np.ndarray) -> dict[str, Splits]:
    """Split at rolling origins: `window-1` to `window-5`, each tested on a later tenth of ratings.

    Window w is tested between the quantiles (w + 4) / 10 and (w + 5) / 10, validated on the tenth
    before, and trained on all earlier ratings: `window-5` is `split_by_time`.

    Args:
        timestamp: int64 [N], in any order.

    Raises:
        ValueError: a split of a window would be empty.
    """
    windows = {}
    for number in range(1, NUM_WINDOWS + 1):
        tenth = 10 - NUM_WINDOWS + number  # at which the window's test ends
        name = f"window-{number}"
        until = ((tenth - 2) / 10, (tenth - 1) / 10, tenth / 10)
        windows[name] = _between_quantiles(timestamp, until, name)
    return windows


def split_each_user(user: np.ndarray, timestamp: np.ndarray) -> Splits:
    """Split each user's ratings at the quantiles 0.8 and 0.9 of the user's own timestamps.

    A user's first 80 % are train, the next 10 % valid, the last 10 % test; ratings of one moment go
    where the first of them goes. With n ratings of the user, of which m are strictly older, a
    rating is train where m <= 0.8 (n - 1), else valid where m <= 0.9 (n - 1), else test. So a user
    with one moment has train rows alone, and one with fewer than seven ratings no valid row. Other
    users' train rows may be later than a user's test rows.

    Args:
        user: int [N], ascending.
        timestamp: int [N], ascending within a user.

    Raises:
        ValueError: a split would be empty.
    """
    user_begin, moment_begin = history_ranges(user, timestamp, length=len(user))
    older = moment_begin - user_begin
    last = np.bincount(user)[user] - 1
    return _splits(
        (older <= UNTIL[0] * last, older <= UNTIL[1] * last, np.ones(len(user), bool)),
        f"the {len(timestamp)} ratings, each user's split in time, leave no row for {{}}; give "
        "users with 7 ratings or more at distinct times, or use the global split",
    )


def _between_quantiles(
    timestamp: np.ndarray,  # [N], int64
    until: Sequence[float],
    window: str = "",
) -> Splits:
    """Split at three quantiles of time; later ratings are in no split."""
    ends = np.quantile(timestamp, until, method="lower")
    return _splits(
        [timestamp <= end for end in ends],
        f"the {len(timestamp)} ratings, split after {ends[0]} and {ends[1]}, leave no row for "
        f"{{}}{window and f' of {window}'}; give ratings at more distinct times",
    )


def _splits(until: Sequence[np.ndarray], problem: str) -> Splits:
    """Return the rows of each split.

    Args:
        until: bool [N] for train, valid and test: rows of that split or one before.
        problem: error message for an empty split, whose name replaces `{}`.
    """
    splits: Splits = {}
    before = np.zeros_like(until[0])
    for name, rows in zip(("train", "valid", "test"), until, strict=True):
        splits[name] = np.flatnonzero(rows & ~before)
        if len(splits[name]) == 0:
            raise ValueError(f"ratings, column 'timestamp': {problem.format(name)}")
        before = rows
    return splits


PROTOCOLS: dict[str, Callable[[Ratings], dict[str, Splits]]] = {
    "global": lambda ratings: {"": split_by_time(ratings.timestamp)},
    "user": lambda ratings: {"": split_each_user(ratings.user, ratings.timestamp)},
    "rolling": lambda ratings: split_rolling(ratings.timestamp),
}
