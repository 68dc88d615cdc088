"""The Jacobian lens: what a change of the residual stream does to the output, on average.

    word_directions(model, ["Eiffel"], texts)["Eiffel"][13]

Gurnee et al. 2026 ("Verbalizable Representations Form a Global Workspace in Language Models",
transformer-circuits.pub/2026/workspace). With x_l the stream after block l, x_F that after the last
block (before the final norm), and V the positions of a text that count,

    J_l = mean over texts of  1/|V| sum_{p in V} sum_{p' in V, p' >= p}  d x_F[p'] / d x_l[p]

The direction of token t at block l is r J_l, where r reads t from x_F. One backward pass with r at
every position of V gives it at all layers, so no J is formed, and neither SAE nor labels are
needed. J itself, `[d_model, d_model]` a layer, is what published lens files hold.

    r = gamma * (W_U[t] - mean over tokens of W_U)        `published`: r = W_U[t]

gamma is the final norm's weight. Published implementations take the second. Its direction raises
t's logit and nearly all others with it, as rows of W_U have much in common. On the starter, after
block 16 at 0.4 dose, the median of 20 words is the 8th likeliest of 49,152 tokens by the first
read-out, and the 9,528th by the second (`scripts/benchmarks/words.py`).
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.block import exactly
from interp_steer.model.forward import padded
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.util.console import Report, watched

SKIP = 16  # first positions of a text that do not count: attention sinks
LENGTH = 128  # tokens of a text that are read
READOUT = {False: "gamma (W_U[t] - mean W_U)", True: "W_U[t]"}
TOGETHER = 4  # texts in one pass


def token_of(model: SteeringModel, word: str) -> int:
    """The one token that says a word: after a space, else at the start of a line.

    Raises:
        RequestError: the tokenizer says it in several tokens; they are named.
    """
    word = word.strip()
    if not word:
        raise RequestError("a word is empty")
    pieces: tuple[int, ...] = ()
    for before, text in (("a", f" {word}"), ("a\n", word)):
        with suppress(RequestError):  # the tokenizer may join a line's end to the word
            ids = model.encode_after(before, text)
            if len(ids) == 1 and model.decode_token(ids[0]).strip() == word:
                return ids[0]
            pieces = pieces or ids
    said = " ".join(repr(model.decode_token(one)) for one in pieces)
    raise RequestError(
        f"{word!r} is no single token of {model.name}: it is said as {said}; give one word of one "
        "token, such as its first part, or make a direction from contrasting prompts"
    )


@dataclass(frozen=True)
class Word:
    """Directions of a word.

    Attributes:
        token: its token's id.
        directions: at each layer; their norm is that of r J_l.
        halves: cosine, at each layer, between the directions of the even and of the odd texts: how
            far the number of texts suffices. None for one text.
        lens: cosine of each with r itself, the logit lens's direction.
    """

    token: int
    directions: DirectionSet
    halves: tuple[float | None, ...] = ()
    lens: tuple[float, ...] = ()


def word_directions(
    model: SteeringModel,
    words: Sequence[str],
    texts: Sequence[Encoded],
    *,
    layers: Sequence[int] | None = None,
    published: bool = False,
    skip: int = SKIP,
    length: int = LENGTH,
    report: Report | None = None,
) -> dict[str, Word]:
    """Steering vectors for words, from one forward pass a text and one backward pass a word.

    Args:
        words: each must be one token (see `token_of`).
        texts: any texts of the kind that the model reads; those of `skip` + 2 tokens or more count.
        layers: None is all but the last, where J is the identity.
        published: read a word by W_U[t] alone, as published implementations do.
        skip, length: positions `skip` to `length` - 2 of a text count.
        report: called with the number of texts done.

    Returns:
        For each word its directions, by the word as it was given.

    Raises:
        RequestError: no word, a word of several tokens, no text that is long enough, or no layer.
    """
    if not words:
        raise RequestError("no word given")
    tokens = [token_of(model, word) for word in words]
    chosen = source_layers(model, layers)
    rows = readout(model, tokens, published)
    sums = torch.zeros(2, len(words), len(chosen), model.d_model, dtype=torch.float64)
    with watched("reading texts", len(texts), report) as told:
        done = 0
        for n, part in pulled(model, texts, chosen, rows, skip, length):
            sums[n % 2] += part
            done = n + 1
            if told:
                told(done)
    total = sums.sum(0) / done
    found = {}
    for w, word in enumerate(words):
        source = {
            **_source(model, done, skip, length, published),
            "method": "jacobian-lens", "word": model.decode_token(tokens[w]),
            "token": str(tokens[w]),
        }  # fmt: skip
        members = [
            Direction.of(total[w, i], f"blocks.{layer}.hook_resid_post", named(word), source)
            for i, layer in enumerate(chosen)
        ]
        halves = _cosines(sums[0, w], sums[1, w]) if done > 1 else [None] * len(chosen)
        lens = _cosines(total[w], rows[w].cpu().double().expand(len(chosen), -1))
        found[word] = Word(tokens[w], DirectionSet(members), tuple(halves), tuple(lens))
    return found


def readout(
    model: SteeringModel, tokens: Sequence[int], published: bool = False
) -> Float[Tensor, "token d_model"]:
    """What reads tokens from the stream after the last block, up to its length, in float32."""
    index = torch.tensor(list(tokens), device=model.device)
    weight: Tensor = model.hf.lm_head.weight.detach()
    if published:
        return weight[index].float()
    mean = torch.stack([part.float().sum(0) for part in weight.split(2**14)]).sum(0) / len(weight)
    gains: Tensor = model.hf.model.norm.weight.detach()
    return (weight[index].float() - mean) * gains.float()


def pulled(
    model: SteeringModel,
    texts: Sequence[Encoded],
    layers: Sequence[int],
    rows: Float[Tensor, "row d_model"],
    skip: int,
    length: int,
    together: int = TOGETHER,
) -> Iterator[tuple[int, Float[Tensor, "row layer d_model"]]]:
    """Of each text, in turn, the rows times its J at the layers, in float32 on the CPU.

    Args:
        together: texts in one forward pass.
    """
    if not model.has_weights:
        raise RequestError("a Jacobian needs the model's weights, which are not here")
    if not 0 <= skip < length - 1:
        raise RequestError(f"skip is {skip}, expected 0 to {length - 2}: the text's length less 2")
    ids = [one.ids[:length] for one in texts if len(one.ids[:length]) >= skip + 2]
    if not ids:
        raise RequestError(
            f"none of {len(texts)} texts is {skip + 2} tokens long; the first {skip} positions and "
            "the last one do not count"
        )
    for start in range(0, len(ids), together):
        some = ids[start : start + together]
        streams, counted = _streams(model, some, layers, skip)
        parts = torch.zeros(len(some), len(rows), len(layers), model.d_model)
        weight = (counted / counted.sum(1, keepdim=True)).double()
        for r, row in enumerate(rows):
            with exactly():
                cotangent = counted[..., None].to(model.dtype) * row.to(model.dtype)
                slopes = torch.autograd.grad(
                    streams[-1], streams[:-1], cotangent, retain_graph=r + 1 < len(rows)
                )
            for i, slope in enumerate(slopes):
                mean = (slope.double() * weight[..., None]).sum(1)
                parts[:, r, i] = mean.cpu()
        for n, part in enumerate(parts):
            yield start + n, part


def _streams(
    model: SteeringModel, ids: Sequence[Sequence[int]], layers: Sequence[int], skip: int
) -> tuple[list[Tensor], Float[Tensor, "text pos"]]:
    """The stream after each of the layers and after the last block, with their graph; and 1 where
    a position counts.
    """
    batch, real = padded(ids, model.device)
    where = torch.arange(batch.shape[1], device=model.device)[None]
    lengths = real.sum(1, keepdim=True)
    counted = ((where >= skip) & (where < lengths - 1)).float()
    kept = {}
    with exactly():
        x = model.embed(batch)
        rotary = model.rotary(x, where)
        for layer in range(model.n_layers):
            rooted = layer > layers[0]  # the graph begins at the first layer that is asked for
            with torch.set_grad_enabled(rooted):
                x = model.block(layer, x, rotary)
            if layer == layers[0]:
                x = x.detach().requires_grad_()
            if layer in layers:
                kept[layer] = x
    return [*(kept[layer] for layer in layers), x], counted


def source_layers(model: SteeringModel, layers: Sequence[int] | None) -> list[int]:
    last = model.n_layers - 1
    chosen = list(range(last)) if layers is None else sorted(set(layers))
    if not chosen or not all(0 <= layer < last for layer in chosen):
        raise RequestError(
            f"layers {', '.join(map(str, chosen)) or 'none'}: a Jacobian lens of {model.name} has "
            f"layers 0-{last - 1}; after the last block, {last}, it is the identity"
        )
    return chosen


def _cosines(one: Float[Tensor, "layer d"], other: Float[Tensor, "layer d"]) -> list[float]:
    return [float(c) for c in torch.cosine_similarity(one, other, dim=-1)]


def named(word: str) -> str:
    """A word as a direction's name."""
    letters = "".join(c if c.isalnum() or c in "._+-" else "_" for c in word.strip())
    return letters if letters.strip("0123456789.+-") else f"word_{letters}"


def _source(
    model: SteeringModel, count: int, skip: int, length: int, published: bool
) -> dict[str, str]:
    return {
        "model": model.name, "revision": model.revision, "fingerprint": model.fingerprint,
        "texts": str(count), "positions": f"{skip} to {length - 2}",
        "readout": READOUT[published], "fit_dtype": str(model.dtype),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
