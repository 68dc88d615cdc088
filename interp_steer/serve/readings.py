"""What is read of a row beside its text: probabilities of tokens, and where a direction shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.engine import LOGITS
from interp_steer.engine.row import Result
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.steering import encoder
from interp_steer.steering.direction import Direction


@dataclass(frozen=True)
class Choice:
    """One token of a sequence, and what the model would have liked.

    Attributes:
        token_id: the token.
        logprob: ln of its probability; None for the first token, before which there is nothing.
        top: the likeliest ids with their ln, likeliest first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def last_site(model: SteeringModel) -> Site:
    """Where `choices` reads."""
    return Site("resid_post", model.n_layers - 1)


def choices(model: SteeringModel, result: Result, top: int) -> tuple[Choice, ...]:
    """Every token of prompt and answer with its ln p.

    A row that ended with a stop has it as its last token: the likeliest of them.

    Args:
        result: with a tap at `last_site`.
    """
    ids = (*model.encode(result.row.prompt).ids, *result.token_ids)
    stops = model.stop_ids if result.finish == "stop" else ()
    return chosen(model, ids, result.taps[last_site(model)], top, stops)


@exactly()
def chosen(
    model: SteeringModel,
    ids: Sequence[int],
    stream: Float[Tensor, "pos d_model"],
    top: int,
    stops: Sequence[int] = (),
) -> tuple[Choice, ...]:
    """Every token's ln p after those before it, and the likeliest tokens there.

    Args:
        stream: after the last block, at every position that was read.
        stops: if the stream has as many positions as there are ids, the likeliest of these follows.
    """
    found = [Choice(ids[0], None)]
    together = max(1, LOGITS // model.d_vocab)
    ended = bool(stops) and len(stream) == len(ids)
    for start in range(0, len(ids) - 1 + ended, together):
        wanted = torch.tensor(ids[start + 1 : start + 1 + together]).long()
        count = min(together, len(ids) - 1 + ended - start)
        x = stream[start : start + count].to(model.device, model.dtype)
        logprobs = model.unembed(x).float().log_softmax(-1).cpu()
        if len(wanted) < count:
            best_stop = max(stops, key=lambda id: float(logprobs[-1, id]))
            wanted = torch.cat([wanted, torch.tensor([best_stop])])
        values, best = logprobs.topk(max(1, top), dim=-1)
        mine = logprobs.gather(1, wanted[:, None])[:, 0]
        for token, ln, near, likely in zip(
            wanted.tolist(), mine.tolist(), values.tolist(), best.tolist(), strict=True
        ):
            tops = tuple(zip(likely, near, strict=True))[:top]
            found.append(Choice(token, ln, tops))
    return tuple(found)


@exactly()
def shades(
    model: SteeringModel, result: Result, direction: Direction
) -> tuple[tuple[str, float], ...]:
    """An answer's text in tokens, each with what a direction reads there after any intervention.

    A feature reads its activation, as its SAE encodes the stream; any other direction the
    projection on its unit vector. Tokens that make one character together are one piece, with the
    largest reading.

    Args:
        result: with a tap at the direction's home.
    """
    x = result.taps[direction.site]
    if direction.is_feature:
        sae = encoder.features().encoder(direction.source, model.device)
        index = torch.tensor([[int(direction.source["index"])]], device=model.device)
        values = sae.latents(x[None].to(model.device).float(), index)[0, :, 0].cpu()
    else:
        values = x.float() @ direction.unit
    first = len(model.encode(result.row.prompt).ids)
    told = values[first : first + len(result.token_ids)].tolist()
    running, shown, start = model.running_text(result.row.prompt), 0, 0
    pieces: list[tuple[str, float]] = []
    for end in range(1, len(told) + 1):  # the last token may not have been read
        running.add(result.token_ids[end - 1])
        if end < len(told) and running.pending:
            continue
        text = running.text
        pieces.append((text[shown:], max(told[start:end], key=abs)))
        shown, start = len(text), end
    return tuple(pieces)
