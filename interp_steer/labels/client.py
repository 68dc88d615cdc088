"""Neuronpedia's API and its export files: one feature, many features, explanation search, labels.

The contract was read from the server's published source and observed on that server; the traps it
sets are named where they are met. Both addresses can be changed: `NEURONPEDIA_URL` for the API and
`NEURONPEDIA_EXPORTS_URL` for the bucket of export files. The key (`NEURONPEDIA_API_KEY`) is sent
to the API's host alone, never to another one that it redirects to, and never printed.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from interp_steer.errors import RequestError, RunError
from interp_steer.labels import naming
from interp_steer.labels.exports import Batch, Export, check_size, listing, number
from interp_steer.labels.http import (
    LARGEST,
    Answer,
    BadAnswer,
    Clock,
    NotFound,
    Transport,
    Unreachable,
)
from interp_steer.labels.label import Feature, Label, Source, parse_id
from interp_steer.labels.rows import read_feature, read_lines, read_row, to_feature
from interp_steer.util.packed import pieces

URL = "https://www.neuronpedia.org"
EXPORTS_URL = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
T = TypeVar("T")
_PAGE = 20  # the server's page of search results; it cannot be changed
_MANY = 500  # features asked for at once: 5,000 were answered in 1.1 s, so this is gentle


class Client:
    """Neuronpedia over HTTP.

    Args:
        url, exports_url, key: the addresses and the key; the environment's if not given.
        offline: refuse every request before a socket is opened.
        wait: sleep through a rate limit; otherwise it is an error that says when it ends.
        patience: seconds after which a server that keeps failing is given up.
        timeout: seconds to connect, and between two pieces of an answer.
        sleep: what waiting is, for tests.

    Raises:
        RequestError: an address or the key cannot be one.
    """

    def __init__(
        self,
        url: str | None = None,
        exports_url: str | None = None,
        key: str | None = None,
        *,
        offline: bool = False,
        wait: bool = False,
        patience: float = 30.0,
        timeout: float = 10.0,
        workers: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        env = os.environ.get
        self.url = _address(url or env("NEURONPEDIA_URL") or URL)
        self.exports_url = _address(exports_url or env("NEURONPEDIA_EXPORTS_URL") or EXPORTS_URL)
        key = (key or env("NEURONPEDIA_API_KEY") or "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):  # and the key itself stays out of the message
            raise RequestError(
                "NEURONPEDIA_API_KEY is not a key: it has spaces or other characters"
            )
        self.patience, self.workers = patience, workers
        self._transport = Transport(
            key, self.url, offline=offline, wait=wait, timeout=timeout, workers=workers, sleep=sleep
        )

    # -- features --------------------------------------------------------------------------------

    def feature(self, source: Source | str, index: int | None = None) -> Feature:
        """One feature with its labels (about 1 MB on the live site: for many, use `features`).

        Args:
            source: a source with an index, or `model/source/index` alone.

        Raises:
            NotFound: the source, or the feature in it, is not there or not public.
        """
        if index is None:
            source, index = parse_id(str(source))
        place = source if isinstance(source, Source) else Source.parse(source)
        answer = self._ask("GET", f"/api/feature/{quote(place.model)}/{quote(place.name)}/{index}")
        if answer.status == 404:
            data = answer.json()  # an HTML page here means that the address is not Neuronpedia's
            if isinstance(data, dict) and "message" in data:  # that is all that tells them apart
                raise NotFound(f"Neuronpedia has no source {place}{naming.like(place)}")
            raise NotFound(f"{place} has no feature {index} on Neuronpedia")
        rows = self._read(answer, lambda data: read_feature(data))
        if (rows[0].model, rows[0].source, rows[0].index) != (place.model, place.name, index):
            raise BadAnswer(f"{answer.url}: answered with another feature")
        return to_feature(place, index, rows)

    def features(self, ids: Iterable[tuple[Source, int]]) -> dict[tuple[Source, int], Feature]:
        """Many features with their labels. Those that the server does not have are left out.

        The server drops missing ones silently, merges duplicates, orders by index across sources,
        and gives away rows of private sources: answers are matched by name, and what was not
        asked for is dropped.
        """
        asked = {(s.model, s.name, index): (s, index) for s, index in ids}
        names, found = list(asked), {}
        for start in range(0, len(names), _MANY):  # an empty list would be a 500
            body = [
                # Without a number of activations (or with 0) the server sends all of them.
                {"modelId": model, "layer": name, "index": str(index), "maxActsToReturn": 1}
                for model, name, index in names[start : start + _MANY]
            ]
            answer = self._ask("POST", "/api/features", body)
            for rows in self._read(answer, lambda data: [read_feature(each) for each in data]):
                place = asked.get((rows[0].model, rows[0].source, rows[0].index))
                if place:
                    found[place] = to_feature(*place, rows)
        return found

    # -- search ----------------------------------------------------------------------------------

    def search(
        self,
        query: str,
        *,
        sources: Sequence[Source] = (),
        model: str | None = None,
        release: str | None = None,
        limit: int = 20,
    ) -> list[Label]:
        """Neuronpedia's own search by meaning: of sources of one model, a model, a release, or all.

        The query leaves this machine for Neuronpedia, which sends it on to OpenAI. Always the
        nearest labels, however far: `score` is the cosine similarity.

        Raises:
            RequestError: fewer than 3 characters, or sources of several models.
            NotFound: Neuronpedia does not know the source, model or release.
            RateLimited: the 200 searches an hour are used up.
        """
        if len(query.encode("utf-16-le")) // 2 < 3:  # counted as the server counts
            raise RequestError(f"query {query!r}: Neuronpedia wants at least 3 characters")
        if len(models := {source.model for source in sources}) > 1:
            raise RequestError(f"one model at a time, not {', '.join(sorted(models))}")
        if sources:
            route = "search"
            body: dict[str, Any] = {
                "modelId": sources[0].model,
                "layers": [s.name for s in sources],
            }
        elif release:
            route, body = "search-release", {"releaseName": release}
        elif model:
            route, body = "search-model", {"modelId": model}
        else:
            route, body = "search-all", {}
        by_name = {(source.model, source.name): source for source in sources}
        found: dict[str, Label] = {}
        # Pages hold explanations, not features, and private rows are taken out of a page after it
        # is cut: a short page is not the last one, only an empty one is. The end is bounded too.
        for page in range(3 * (limit // _PAGE + 1) + 2):
            asked = {**body, "query": query, "offset": page * _PAGE}
            # A 500 here may be our own mistake: one more try, not four.
            answer = self._ask("POST", f"/api/explanation/{route}", asked, tries=2, bucket="search")
            if answer.status >= 500:
                self._explain(answer, sources, release)
            results = self._read(answer, lambda data: [_result(each) for each in data["results"]])
            # An unknown model is no error to this route: it has no labels.
            if route == "search-model" and page == 0 and not results and self._unknown(model):
                raise NotFound(f"Neuronpedia has no model {model!r}")
            for label in results:
                if label.label:
                    known = by_name.get((label.model, label.source), Source("", ""))
                    label = replace(label, release=known.release, sae_id=known.sae_id)
                    found.setdefault(label.id, label)  # one row per explanation: the first is best
            if not results or len(found) >= limit:
                break
        return list(found.values())[:limit]

    def _unknown(self, model: str | None) -> bool:
        return self._ask("POST", "/api/model/get", {"id": model}).json() is None

    def _explain(self, answer: Answer, sources: Sequence[Source], release: str | None) -> None:
        """Finds out what a search's 500 means: an unknown source, or a server in trouble."""
        for source in sources:
            kind = source.name.partition("-")[2].partition("__")[0] or "neurons"
            found = self._ask("GET", f"/api/source-set/{quote(source.model)}/{quote(kind)}").json()
            names = _names(found)
            if found is None or (names and source.name not in names):
                raise NotFound(f"Neuronpedia has no source {source}{naming.like(source)}")
        hint = f"; perhaps it has no release {release!r}" if release else ""
        raise Unreachable(f"{answer.url}: {answer.said} (status {answer.status}){hint}")

    # -- export files ----------------------------------------------------------------------------

    def exports(
        self, source: Source, kind: str = "explanations", *, clock: Clock | None = None
    ) -> list[Export]:
        """The files that a source's export consists of now, in the order of their numbers.

        Their number cannot be known otherwise: it is not fixed, and the list comes by text, with
        batch-10 before batch-2. Empty if the bucket does not know the source. Of files with one
        ETag, which are one file, the first.

        Raises:
            BadAnswer: the list ends before its end, repeats itself or names a file twice.
        """
        clock = clock or Clock(self.patience)
        prefix = f"v1/{source.model}/{source.name}/"
        found: dict[str, Export] = {}
        token: str | None = None
        tokens: set[str] = set()
        while True:
            ask = {"list-type": "2", "prefix": f"{prefix}{kind}/"}
            if token:
                ask["continuation-token"] = token
            url = f"{self.exports_url}/?{urlencode(ask)}"
            answer = self._transport.send("GET", url, clock=clock)
            _checked(answer)
            page, following = listing(answer, source, prefix)
            for file in page:
                if found.setdefault(file.key, file) != file:
                    raise BadAnswer(f"{answer.url}: the list has two files of name {file.key}")
            if following is None:
                files = sorted(found.values(), key=lambda file: (number(file.key), file.key))
                first: dict[str, Export] = {}
                for file in files:
                    first.setdefault(file.etag or file.key, file)
                return list(first.values())
            if following in tokens:
                raise BadAnswer(f"{self.exports_url}: the list of {source} does not end")
            tokens.add(following)
            token = following

    def download(
        self, file: Export, etag: str | None = None, *, clock: Clock | None = None
    ) -> Batch | None:
        """A file's rows; None if it still has the ETag given.

        Raises:
            RunError: it cannot be fetched, has another size than the bucket lists, is damaged, or
                has rows of another source. A damaged file is fetched once more first: the fault may
                lie on the way.
        """
        clock = clock or Clock(self.patience)
        headers = {"If-None-Match": etag} if etag else {}
        path = quote(f"v1/{file.source}/{file.key}")
        for attempt in (1, 2):
            answer = self._transport.send(
                "GET", f"{self.exports_url}/{path}", clock=clock, headers=headers,
                most=max(LARGEST, file.size or 0),
            )  # fmt: skip
            if answer.status == 304:
                return None
            _checked(answer)
            try:
                check_size(file, answer)
                rows = read_lines(pieces(answer.body))
                if not rows and len(answer.body) != file.size:
                    raise ValueError("it has no rows")
                for row in rows:
                    if (row.model, row.source) != (file.source.model, file.source.name):
                        raise ValueError(f"it has labels of {row.model}/{row.source}")
            except ValueError as error:
                if attempt == 2:
                    raise RunError(f"{file.key}: {error}") from error
                continue
            digest = hashlib.sha256(answer.body).digest()
            return Batch(answer.headers.get("ETag"), rows, len(answer.body), digest)
        raise AssertionError  # not reached

    # -- the API ---------------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, body: object = None, *, tries: int = 4, bucket: str = "api"
    ) -> Answer:
        answer = self._transport.send(
            method, self.url + path, clock=Clock(self.patience), body=body, tries=tries,
            bucket=bucket,
        )  # fmt: skip
        if bucket == "search" and answer.status >= 500:
            return answer  # the caller finds out whose fault it is
        return answer if answer.status == 404 and method == "GET" else _checked(answer)

    def _read(self, answer: Answer, read: Callable[[Any], T]) -> T:
        """The answer's JSON as `read` understands it, or one error that says where it came from."""
        data = answer.json()
        try:
            return read(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadAnswer(f"{answer.url}: not the answer expected ({error!r:.100})") from error


def _checked(answer: Answer) -> Answer:
    """The answer, if it is one.

    Raises:
        NotFound, RequestError: the server says that the request was wrong.
        Unreachable, BadAnswer: the server is in trouble, or is not Neuronpedia.
    """
    if answer.status == 200:
        return answer
    said = f"{answer.url}: {answer.said} (status {answer.status})"
    if answer.status >= 500:
        raise Unreachable(said)
    if answer.status == 400:
        raise RequestError(said)
    raise BadAnswer(said)


def _result(result: Any) -> Label:
    """A search result as a label; its feature's row comes along, with the feature's numbers."""
    row = read_row(result)
    neuron = result.get("neuron")
    neuron = neuron if isinstance(neuron, dict) else {}
    numbers = read_row({**neuron, **{k: result[k] for k in ("modelId", "layer", "index")}})
    score = result.get("cosine_similarity")
    return Label(
        row.model, row.source, row.index, row.label, row.explainer, row.type, row.score,
        numbers.density, numbers.max_activation, uid=row.uid,
        score=float(score) if isinstance(score, int | float) else None,
    )  # fmt: skip


def _names(found: Any) -> set[str]:
    """The source names in a source set, however deep the answer puts them."""
    sources = found.get("sources") if isinstance(found, dict) else None
    ids = {each.get("id") for each in sources or [] if isinstance(each, dict)}
    return {name for name in ids if isinstance(name, str)}


def _address(url: str) -> str:
    """A base address without its closing slash, which would make the server redirect."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise RequestError(f"{url!r} is not an address: expected https://host")
    return url.rstrip("/")
