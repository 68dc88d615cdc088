"""Files and answers that may be gzipped, unpacked piece by piece and only so far as is sensible."""

import zlib
from collections.abc import Iterable, Iterator
from itertools import chain

PIECE = 2**16  # bytes read, or unpacked, at once
LONGEST = 2**23  # bytes of a line; a feature with all its activations has about 2**20
SMALL = 2**23  # bytes that anything may unpack to
RATIO = 100  # what is larger may unpack to so many times its size; exports do to 3-30 times
_GZIP = b"\x1f\x8b"
_TWICE = 2  # a gzip file may be sent gzipped


def pieces(data: bytes) -> Iterator[bytes]:
    """Bytes that are here already, piece by piece."""
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def unpacked(given: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces with their gzip taken off, known by its first bytes: servers disagree about who says
    that it is gzip.

    Raises:
        ValueError: the file is cut short or damaged (its checksum is compared), or unpacks to far
            more than any file of labels does.
    """
    for _ in range(_TWICE):
        given = _once(given)
    return iter(given)


def _once(given: Iterable[bytes]) -> Iterator[bytes]:
    rest = iter(given)
    head = b""
    while len(head) < len(_GZIP) and (piece := next(rest, b"")):
        head += piece
    if not head.startswith(_GZIP):
        yield from chain([head] if head else [], rest)
        return
    unpacker, taken, made = zlib.decompressobj(31), 0, 0
    for piece in chain([head], rest):
        taken += len(piece)
        while True:
            if unpacker.eof:
                if not (piece := piece.lstrip(b"\0")):  # zeros may fill up the last block
                    break
                unpacker = zlib.decompressobj(31)  # gzip files one after the other are one
            try:
                out = unpacker.decompress(piece, PIECE)
            except zlib.error as error:
                raise ValueError("broken gzip") from error
            made += len(out)
            if made > max(SMALL, RATIO * taken):
                raise ValueError(f"it unpacks to more than {RATIO} times its size")
            if out:
                yield out
            piece = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            if not piece and (unpacker.eof or len(out) < PIECE):
                break
    if not unpacker.eof:
        raise ValueError("broken gzip")


def inflate(data: bytes) -> bytes:
    """Unpacks bytes; raises as `unpacked` does."""
    return b"".join(unpacked(pieces(data)))


def lines(given: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that may be gzipped; raises as `unpacked` does.

    Raises:
        ValueError: a line is longer than any is; the message names it.
    """
    rest, number = b"", 1
    for piece in unpacked(given):
        first, *more = piece.split(b"\n")
        rest += first
        if len(rest) > LONGEST:
            raise ValueError(f"line {number} is unreadable: longer than {LONGEST:,} bytes")
        if more:
            yield from (rest, *more[:-1])
            rest = more[-1]
            number += len(more)
    yield rest
