"""Byte offsets in one arena for tensors whose lifetimes are known: dynamic storage allocation, solved greedily.

Each tensor takes the lowest free offset; what differs is the order in which the tensors are taken. Four orders are
tried and the smallest arena wins: by size, by breadth (the live bytes of the widest call in the life of a tensor), by
time, and by area (bytes x calls). The first two are "greedy by size" and "greedy by breadth" of Pisarchyk & Lee 2020,
"Efficient memory management for deep neural net inference" (arXiv 2001.03288); the last two are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes: a cache line, an AVX-512 register, and the alignment that compiled kernels assume of every tensor."""


@dataclass(frozen=True)
class Request:
    """A tensor to place: its size in bytes and its first and last call, both included."""

    bytes: int
    first: int
    last: int


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def peak(requests: Sequence[Request]) -> int:
    """The largest sum of bytes that are live at one call; 0 without requests."""
    change: dict[int, int] = {}
    for r in requests:
        change[r.first] = change.get(r.first, 0) + r.bytes
        change[r.last + 1] = change.get(r.last + 1, 0) - r.bytes
    live = top = 0
    for call in sorted(change):
        live += change[call]
        top = max(top, live)
    return top


def _first_fit(requests: Sequence[Request], order: Sequence[int]) -> list[int]:
    """Offsets, each the lowest multiple of ALIGNMENT that is free during the whole life of its tensor."""
    offsets = [0] * len(requests)
    placed: list[int] = []  # by offset
    for i in order:
        r = requests[i]
        offset = 0
        for j in placed:
            other = requests[j]
            if other.last < r.first or r.last < other.first:
                continue
            if offsets[j] - offset >= r.bytes:
                break
            offset = max(offset, offsets[j] + _padded(other.bytes))
        offsets[i] = offset
        placed.append(i)
        placed.sort(key=offsets.__getitem__)
    return offsets


def _orders(requests: Sequence[Request]) -> Iterator[list[int]]:
    """The orders to try, best guess first."""
    ids = range(len(requests))
    yield sorted(ids, key=lambda i: (-requests[i].bytes, requests[i].first))
    breadth = _breadth(requests)
    yield sorted(ids, key=lambda i: (-breadth[i], -requests[i].bytes, requests[i].first))
    yield sorted(ids, key=lambda i: (requests[i].first, -requests[i].bytes))
    yield sorted(ids, key=lambda i: -requests[i].bytes * (requests[i].last - requests[i].first + 1))


def _breadth(requests: Sequence[Request]) -> list[int]:
    """For each tensor the live bytes of the widest call within its life (the sum only grows where a life begins)."""
    live = {c: sum(r.bytes for r in requests if r.first <= c <= r.last) for c in {r.first for r in requests}}
    return [max(total for c, total in live.items() if r.first <= c <= r.last) for r in requests]


def assign_offsets(requests: Sequence[Request]) -> list[int]:
    """Byte offsets, multiples of `ALIGNMENT`, such that tensors which live at the same call do not overlap.

    First fit in several orders, the smallest arena kept; stops early where an arena reaches the lower bound.
    """
    bound = peak(requests)
    best: list[int] = []
    best_end = -1
    for order in _orders(requests):
        offsets = _first_fit(requests, order)
        end = max((o + r.bytes for o, r in zip(offsets, requests, strict=True)), default=0)
        if best_end < 0 or end < best_end:
            best, best_end = offsets, end
        if best_end <= bound:
            break
    return best
