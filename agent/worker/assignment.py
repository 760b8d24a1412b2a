"""Which detection belongs to which track: pairs of greatest total similarity, exactly."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
from numpy.typing import NDArray


def best_pairs(similarity: NDArray[np.floating]) -> List[Tuple[int, int]]:
    """Pairs (row, column) whose similarities add up to the most, each row and column used once; pairs of 0 are never made.

    Rows and columns that have only each other are paired at once, which settles most of a scene; what is left, the crowd, goes through
    the Hungarian method (Kuhn 1955, in the shortest-path form of Jonker and Volgenant 1987), O(n^3).
    """
    fits = similarity > 0
    alone = fits & (fits.sum(axis=1, keepdims=True) == 1) & (fits.sum(axis=0, keepdims=True) == 1)
    pairs = [(int(row), int(column)) for row, column in np.argwhere(alone)]
    open_rows, open_columns = fits.any(axis=1) & ~alone.any(axis=1), fits.any(axis=0) & ~alone.any(axis=0)
    rows, columns = np.flatnonzero(open_rows), np.flatnonzero(open_columns)
    if not len(rows):
        return pairs
    rest = similarity[np.ix_(rows, columns)]
    turned = len(rows) > len(columns)
    for row, column in _hungarian(-(rest.T if turned else rest)):
        if turned:
            row, column = column, row
        if rest[row, column] > 0:
            pairs.append((int(rows[row]), int(columns[column])))
    return pairs


def _hungarian(cost: NDArray[np.floating]) -> List[Tuple[int, int]]:
    """A column for every row, of least total cost; needs at least as many columns as rows."""
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)  # the row of each column; the last column is the root of each search
    for row in range(rows):
        owner[columns], column = row, columns
        reach, before = np.full(columns, np.inf), np.full(columns, columns)
        is_done = np.zeros(columns + 1, bool)
        while owner[column] >= 0:
            is_done[column] = True
            at = owner[column]
            slack = cost[at] - row_price[at] - column_price[:columns]
            is_open = ~is_done[:columns]
            shorter = is_open & (slack < reach)
            reach[shorter], before[shorter] = slack[shorter], column
            following = int(np.where(is_open, reach, np.inf).argmin())
            step = reach[following]
            row_price[owner[is_done]] += step
            column_price[is_done] -= step
            reach[is_open] -= step
            column = following
        while column != columns:
            owner[column] = owner[before[column]]
            column = int(before[column])
    return [(int(owner[column]), column) for column in range(columns) if owner[column] >= 0]
