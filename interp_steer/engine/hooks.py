"""The same rows through TransformerLens, for a researcher's own code.

hooks = fwd_hooks(model, steer, prompt)
with model.hooked.hooks(fwd_hooks=hooks):
    ...
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp_steer.engine.admission import Admission
from interp_steer.engine.bank import Bank, Hook, Operands
from interp_steer.engine.row import Row, Score
from interp_steer.errors import RequestError
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Given
from interp_steer.steering.intervention import Intervention

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


def fwd_hooks(
    model: SteeringModel,
    steer: Sequence[Intervention],
    prompt: Given,
    *,
    cached: bool = False,
) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
    """Interventions as TransformerLens hooks, for sequences that begin with one prompt.

    Every row of a batch is steered alike. A row that begins otherwise (another prompt, padding on
    the left) is refused when it is embedded: its positions would be wrong. What follows the prompt
    may differ from row to row.

    Args:
        steer: resolved interventions (lengths, not doses).
        prompt: tells scopes where the prompt ends and what of it is content; gates judge it.
        cached: True for use with a KV cache: each call goes on where the last one ended. A list
            made so serves one generation. Otherwise every call starts at position 0.

    Returns:
        (hook name, hook function) pairs as `HookedTransformer.hooks` and `run_with_hooks` take.

    Raises:
        RequestError: an intervention does not fit the model or has no length yet.
    """
    row = Admission(model).steered(Row(prompt, tuple(steer)))

    operands = Operands(model.device)

    @lru_cache(maxsize=4)
    def banks(batch: int, begin: int, length: int) -> dict[Hook, Bank]:
        return operands.banks([row] * batch, [(begin, length)] * batch)

    hooks = {(site.component, site.layer) for site in row[0].steps}
    found = [
        (Site(at[0], at[1], 0 if at[0] == "z" else None).hook_name, _hook(banks, at, cached))
        for at in sorted(hooks)
    ]
    return [("hook_embed", _guard(model, row[1].ids, cached)), *found] if found else []


def _hook(
    banks: Callable[[int, int, int], dict[Hook, Bank]], at: Hook, cached: bool
) -> Callable[..., Tensor]:
    read = 0

    def steered(x: Tensor, hook: Any) -> Tensor:
        nonlocal read
        begin = read
        read += x.shape[1] if cached else 0
        here = banks(len(x), begin, x.shape[1])
        return here[at].apply(x.clone()) if at in here else x

    return steered


def _guard(model: SteeringModel, ids: Sequence[int], cached: bool) -> Callable[..., None]:
    """Refuses sequences that do not begin with these tokens, by what they are embedded as."""
    read = 0

    def check(x: Tensor, hook: Any) -> None:
        nonlocal read
        here = torch.tensor(ids[read : read + x.shape[1]], dtype=torch.long, device=x.device)
        read += x.shape[1] if cached else 0
        begins = model.embed(here[None])[0]
        for number, embedded in enumerate(x):
            if not torch.equal(embedded[: len(begins)], begins[: len(embedded)].to(x)):
                raise RequestError(
                    f"row {number} of the batch does not begin with the {len(ids)} tokens of the "
                    "prompt that these hooks were made for (another prompt, or padding): they "
                    "would steer wrong positions; run each prompt with hooks of its own, or use "
                    "Engine, which takes rows of any prompts"
                )

    return check


def run_with_cache(
    model: SteeringModel, prompt: Given, steer: Sequence[Intervention] = (), **options: Any
) -> "tuple[Tensor, ActivationCache]":
    """Logits `[1, pos, d_vocab]` and TransformerLens's ActivationCache of a steered prompt.

    Args:
        options: passed on to `HookedTransformer.run_with_cache`, such as `names_filter`.
    """
    ids = torch.tensor([model.encode(prompt).ids], device=model.device)
    with exactly(), model.hooked.hooks(fwd_hooks=fwd_hooks(model, steer, prompt)):
        logits, cache = model.hooked.run_with_cache(ids, **options)
    return logits, cache


def score(model: SteeringModel, row: Row, continuation: Sequence[int]) -> Score:
    """`Engine.score` of one row through the HookedTransformer; slower, for studies and checks."""
    given = tuple(int(i) for i in continuation)
    ids = model.encode(row.prompt).ids
    tokens = torch.tensor([[*ids, *given]], device=model.device)
    hooks = fwd_hooks(model, row.steer, row.prompt)
    with exactly(), model.hooked.hooks(fwd_hooks=hooks):
        logits = model.hooked(tokens, return_type="logits")[0, len(ids) - 1 :].float()
    after = torch.tensor(given, dtype=torch.long, device=model.device)
    logprobs = logits[:-1].log_softmax(-1).gather(1, after[:, None])[:, 0]
    return Score(given, logprobs.cpu(), logits[-1].cpu())
