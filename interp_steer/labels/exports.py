"""Export files as Neuronpedia's bucket lists them, and what of that list is not believed."""

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from interp_steer.labels.http import Answer, BadAnswer
from interp_steer.labels.label import Source
from interp_steer.labels.rows import Row


@dataclass(frozen=True, slots=True)
class Export:
    """One file of an export, as the bucket lists it; `key` is relative to the source's folder."""

    source: Source
    key: str
    etag: str | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A file's rows, all of them, with the ETag that it had."""

    etag: str | None
    rows: list[Row]
    size: int
    digest: bytes = b""


def check_size(file: Export, answer: Answer) -> None:
    """Raises ValueError if a body is not as long as the bucket said that the file is.

    A file that was replaced since it was listed is known by its ETag, and may have another length.
    """
    got, etag = len(answer.body), answer.headers.get("ETag")
    if not got and (file.size or file.key.endswith(".gz")):
        raise ValueError("the answer is empty")
    replaced = etag is not None and file.etag is not None and etag != file.etag
    if file.size is not None and got != file.size and not replaced:
        raise ValueError(f"{got:,} bytes came, and the list says {file.size:,}")


def listing(answer: Answer, source: Source, prefix: str) -> tuple[list[Export], str | None]:
    """One page of the bucket's list, and the token of the next page."""
    try:
        root = ElementTree.fromstring(answer.body)
    except ElementTree.ParseError as error:
        raise BadAnswer(f"{answer.url}: not a list of files") from error
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
    if root.tag != f"{space}ListBucketResult":
        raise BadAnswer(f"{answer.url}: not a list of files")
    found = []
    entries = root.findall(f"{space}Contents")
    count = root.findtext(f"{space}KeyCount", "").strip()
    if count.isdecimal() and int(count[:18]) != len(entries):
        raise BadAnswer(f"{answer.url}: the list has {len(entries)} files and speaks of {count}")
    for entry in entries:
        key = entry.findtext(f"{space}Key", "")
        size = entry.findtext(f"{space}Size", "").strip()
        if key.startswith(prefix) and re.search(r"\.jsonl(\.gz)?$", key):
            etag = entry.findtext(f"{space}ETag")
            known = int(size) if re.fullmatch(r"[0-9]{1,18}", size) else None
            found.append(Export(source, key[len(prefix) :], etag, known))
    if root.findtext(f"{space}IsTruncated", "false").strip().lower() != "true":
        return found, None
    if not (token := root.findtext(f"{space}NextContinuationToken")):
        raise BadAnswer(f"{answer.url}: the list breaks off: it has no token for its next page")
    return found, token


def number(key: str) -> int:
    """The number in a batch's name."""
    digits = re.search(r"(\d{1,18})\.jsonl", key)
    return int(digits[1]) if digits else -1
