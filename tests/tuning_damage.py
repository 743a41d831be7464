"""Random damage to a file of lines, with the account of whose bytes it touched."""

from __future__ import annotations

import random

NOBODY = -1
GARBAGE = (
    b"\x00" * 40,
    b"\xff\xfe\xfa",
    b'{"when": "2026-11-21T10',
    b'{"when": {"when": [',
    b"{",
    b'"',
    b"\\",
    b"}",
    b"<<<<<<< HEAD\n",
    b"\n\n\n",
    b"\r\n",
    b"\xe2\x82",
    b"[" * 3000,
    b'{"outcome": "ok"}',
    b"null",
    b"z" * 50_000,
)


def damage_at_random(rng: random.Random, lines: list[bytes]) -> tuple[bytes, list[int]]:
    """`lines` with one to four kinds of damage, and the numbers of the lines none of whose bytes were touched.

    The newline at a line's end is not one of its bytes: losing it must not lose the record.
    """
    text = bytearray(b"".join(lines))
    owner = [who for i, line in enumerate(lines) for who in (*[i] * (len(line) - 1), NOBODY)]
    touched: set[int] = set()
    for _ in range(rng.randint(1, 4)):
        rng.choice((flip, cut, insert, overwrite, copy, end, newline))(rng, text, owner, touched)
    if rng.random() < 0.1:
        text[:0], owner[:0] = b"\xef\xbb\xbf", [NOBODY] * 3
    return bytes(text), [i for i in range(len(lines)) if i not in touched]


def flip(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    if text:
        at = rng.randrange(len(text))
        text[at] ^= 1 << rng.randrange(8)
        touched.add(owner[at])


def cut(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    start, stop = _range(rng, text)
    touched.update(owner[start:stop])
    del text[start:stop], owner[start:stop]


def overwrite(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    start, stop = _range(rng, text)
    touched.update(owner[start:stop])
    text[start:stop] = rng.choice((rng.randbytes(stop - start), b"\x00" * (stop - start)))


def insert(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    _put(rng, text, owner, touched, rng.choice((*GARBAGE, rng.randbytes(rng.randint(1, 60)))))


def copy(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    start, stop = _range(rng, text)
    _put(rng, text, owner, touched, bytes(text[start:stop]))


def end(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    """The file ends earlier, as after a kill or a full disk."""
    at = rng.randint(max(0, len(text) - 1500), len(text))
    touched.update(owner[at:])
    del text[at:], owner[at:]


def newline(rng: random.Random, text: bytearray, owner: list[int], touched: set[int]) -> None:
    """Every newline, or one of them, becomes something else."""
    places = [i for i, who in enumerate(owner) if who == NOBODY and text[i] == 10]
    for at in reversed(places if rng.random() < 0.3 else places[:1]):
        other = rng.choice((b"", b"\r\n", b"\r", b" ", b"\x00", b"}"))
        text[at : at + 1], owner[at : at + 1] = other, [NOBODY] * len(other)


def _range(rng: random.Random, text: bytearray) -> tuple[int, int]:
    start = rng.randint(0, len(text))
    return start, min(len(text), start + rng.choice((1, 8, 40, 400, 1200)))


def _put(rng: random.Random, text: bytearray, owner: list[int], touched: set[int], new: bytes) -> None:
    """Insert where a line begins or ends, or anywhere."""
    edges = [i for i in range(1, len(owner)) if owner[i - 1] != owner[i]]
    at = rng.choice(edges) if edges and rng.random() < 0.5 else rng.randint(0, len(text))
    if 0 < at < len(owner) and owner[at - 1] == owner[at]:
        touched.add(owner[at])
    text[at:at], owner[at:at] = new, [NOBODY] * len(new)
