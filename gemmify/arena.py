"""Byte offsets in one arena for tensors whose lifetimes are known: dynamic storage allocation, solved greedily.

Each tensor takes the lowest free offset; what differs is the order in which the tensors are taken. Four orders are
tried and the smallest arena wins: by size, by breadth (the live bytes of the widest call in the life of a tensor), by
time, and by area (bytes x calls). The first two are "greedy by size" and "greedy by breadth" of Pisarchyk & Lee 2020,
"Efficient memory management for deep neural net inference" (arXiv 2001.03288); the last two are ours. Some order gives
the best arena there is, so where the four miss the lower bound, a short seeded search perturbs the best of them:
without it, one chain in three of tensors of random sizes ends above its bound.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes: a cache line, an AVX-512 register, and the alignment that compiled kernels assume of every tensor."""


SEARCH_STEPS = 200


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


def _end(requests: Sequence[Request], offsets: Sequence[int]) -> int:
    return max((o + r.bytes for o, r in zip(offsets, requests, strict=True)), default=0)


def _perturbed(requests: Sequence[Request], order: list[int], offsets: list[int], rng: random.Random) -> list[int]:
    """`order` with the tensor that ends the arena moved to a random place, and two random tensors exchanged."""
    changed = list(order)
    top = max(changed, key=lambda i: offsets[i] + requests[i].bytes)
    changed.remove(top)
    changed.insert(rng.randrange(len(order)), top)
    i, j = rng.randrange(len(order)), rng.randrange(len(order))
    changed[i], changed[j] = changed[j], changed[i]
    return changed


def assign_offsets(requests: Sequence[Request]) -> list[int]:
    """Byte offsets, multiples of `ALIGNMENT`, such that tensors which live at the same call do not overlap.

    The best of several greedy orders and of a search of SEARCH_STEPS steps around it; ends early at the lower bound.
    The same requests give the same offsets.
    """
    tried = [(_first_fit(requests, order), order) for order in _orders(requests)]
    best, order = min(tried, key=lambda found: _end(requests, found[0]))
    bound = peak([Request(_padded(r.bytes), r.first, r.last) for r in requests])
    rng = random.Random(0)
    for _ in range(SEARCH_STEPS):
        if _padded(_end(requests, best)) <= bound:
            break
        changed = _perturbed(requests, order, best, rng)
        offsets = _first_fit(requests, changed)
        if _end(requests, offsets) <= _end(requests, best):
            best, order = offsets, changed
    return best
