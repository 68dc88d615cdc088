"""The contract, checked on the user's own model: `interp-steer verify --model M`.

Every check compares the engine with something that does not share its code, or with itself under
another arrangement that must not matter, and states a difference and a tolerance.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp_steer.engine import hooks
from interp_steer.engine.bench import NEW_TOKENS, Bench
from interp_steer.engine.decoding import Decoding
from interp_steer.engine.row import Row, Sampling
from interp_steer.model.model import SteeringModel
from interp_steer.steering.grammar import steer
from interp_steer.util.console import Report


@dataclass(frozen=True)
class Check:
    """One line of the contract.

    Attributes:
        name: what was compared.
        difference: the largest one found.
        tolerance: the largest one allowed; 0 is equality to the bit.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the contract holds; a difference that is not a number fails."""
        return self.difference <= self.tolerance


Result = tuple[float, float]
Compare = Callable[[Bench], Result | None]
CHECKS: list[tuple[str, Compare]] = []


def _check(name: str) -> Callable[[Compare], Compare]:
    """Adds a check: a function to (difference, tolerance), or None where it does not apply."""

    def added(function: Compare) -> Compare:
        CHECKS.append((name, function))
        return function

    return added


@_check("zero-strength add, norm-kept add and rotate are bit-equal to unsteered")
def _zero(b: Bench) -> Result:
    idle = [
        steer("add", b.first, coefficient=0, at=b.layer),
        steer("add_norm_kept", b.first, coefficient=0, at=b.layer),
        steer("rotate", b.first, b.second, coefficient="0 deg", at=b.layer),
    ]
    plain = b.last([Row(b.prompts[0])], [b.answers[0]])
    return max(
        b.apart(plain, b.last([Row(b.prompts[0], (one,))], [b.answers[0]])) for one in idle
    ), 0.0


@_check("a row in a batch = the row alone (teacher-forced logits)")
def _batched(b: Bench) -> Result:
    if b.exact:
        return b.apart(b.batched, b.alone), 1e-3
    return b.apart(b.batched, b.alone), 1.5 * _transformers_noise(b)


def _transformers_noise(b: Bench) -> float:
    """How far transformers itself is from itself, alone and batched, on the same tokens.

    The same tokens steered by a hook, so that what is compared is as far from the training data.
    """
    found = 0.0
    for dose in (0.0, 0.5):
        sequences = [b.sequence(r, a) for r, a in zip(b.rows, b.answers, strict=True)]
        together = b.hf_logits(sequences, dose)
        single = torch.cat([b.hf_logits([s], dose) for s in sequences])
        found = max(found, b.apart(together, single))
    return found


@_check("padded = unpadded")
def _padded(b: Bench) -> Result:
    lengths = [len(b.model.encode(p).ids) for p in b.prompts]
    short = min(range(len(lengths)), key=lengths.__getitem__)
    row, answer = next(
        (r, a)
        for r, a in zip(b.rows, b.answers, strict=True)
        if r.prompt == b.prompts[short] and r.steer
    )
    other = Row(b.prompts[1 - short], row.steer)
    longer = [*answer, *answer, *answer]
    both = b.last([row, other], [answer, longer])
    tolerance = 1e-3 if b.exact else max(1.5 * _transformers_noise(b), 1e-3)
    return b.apart(both[:1], b.last([row], [answer])), tolerance


@_check("cached decoding = one uncached pass")
def _cached(b: Bench) -> Result:
    differences = []
    for row, answer in zip(b.rows[:8], b.answers[:8], strict=True):
        steered = b.engine.admission.steered(row)
        with torch.no_grad():
            decoding = Decoding(b.model)
            arrival = decoding.read([steered], [len(answer)])
            decoding.advance(0, arrival)
            x = arrival.x
            for token in answer:
                x = decoding.step(torch.tensor([token], device=b.model.device))
                decoding.advance(1)
            differences.append(b.apart(b.model.unembed(x).cpu(), b.last([row], [answer])))
    return max(differences), 1e-3 if b.exact else b.close()


@_check("shared prefill = a prefill of its own")
def _shared(b: Bench) -> Result:
    mine = [r for r in b.rows if r.prompt == b.prompts[0]]
    none = [()] * len(mine)
    return b.apart(b.last(mine, none), torch.cat([b.last([r], [()]) for r in mine])), (
        1e-3 if b.exact else 1.5 * _transformers_noise(b)
    )


@_check("engine = a plain Hugging Face forward hook")
def _plain_hook(b: Bench) -> Result:
    row = next(i for i, r in enumerate(b.rows) if r.steer == (b.add(),))
    reference = b.hf_logits([b.sequence(b.rows[row], b.answers[row])], dose=0.5)
    return b.apart(b.alone[row : row + 1], reference), b.close()


@_check("engine = TransformerLens hooks, every operator")
def _lens_hooks(b: Bench) -> Result:
    worst = 0.0
    for i, (row, answer) in enumerate(zip(b.rows, b.answers, strict=True)):
        logits = hooks.score(b.model, row, answer).last_logits
        assert logits is not None
        worst = max(worst, b.apart(b.alone[i], logits))
    return worst, b.close()


@_check("Hugging Face logits = HookedTransformer logits")
def _parity(b: Bench) -> Result:
    ids = torch.tensor([b.sequence(b.rows[0], b.answers[0])], device=b.model.device)
    with torch.no_grad():
        mine, other = b.model.hf(ids).logits, b.model.hooked(ids, return_type="logits")
    return b.apart(mine, other), b.close()


@_check("rotary angles agree up to the end of the context")
def _far(b: Bench) -> Result:
    model = b.model
    attention = model.hooked.blocks[0].attn
    n = min(model.n_ctx, 32768)  # longer tables say nothing new, and take memory
    sin, cos = attention.calculate_sin_cos_rotary(model.d_head, n, base=model.shape.rope.base)
    with torch.no_grad():
        x = torch.zeros(1, n, 1, device=model.device)
        hf_cos, hf_sin = model.hf.model.rotary_emb(x, torch.arange(n, device=model.device)[None])
    apart = max(b.apart(cos.to(model.device), hf_cos[0]), b.apart(sin.to(model.device), hf_sin[0]))
    # angles of n radians carry an error of about n * 2^-23 in float32
    return apart, n * 2.0**-22


@_check("positions beyond the original context agree")
def _beyond(b: Bench) -> Result | None:
    scaling = b.model.shape.rope.scaling
    original = scaling.original_n_ctx if scaling else b.model.n_ctx
    if original > 2048 or original + 16 > b.model.n_ctx:
        return None  # the check of the angles covers it without a pass over so many tokens
    draw = torch.Generator().manual_seed(0)
    n = min(original + 64, b.model.n_ctx)
    ids = torch.randint(b.model.d_vocab, (1, n), generator=draw).to(b.model.device)
    with torch.no_grad():
        mine, other = b.model.hf(ids).logits, b.model.hooked(ids, return_type="logits")
    return b.apart(mine, other), b.close()


@_check("greedy decoding = transformers.generate (logit gap where tokens differ)")
def _decoding(b: Bench) -> Result:
    def generate(ids: Tensor) -> Any:
        return b.model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )

    with _plain_generation(b.model):
        return _greedy(b, generate)


@contextlib.contextmanager
def _plain_generation(model: SteeringModel) -> Iterator[None]:
    """The model without its `generation_config`, whose beams, penalties and forced or suppressed
    tokens `generate` would take up beside what it is given.
    """
    from transformers import GenerationConfig

    kept = model.hf.generation_config
    model.hf.generation_config = GenerationConfig(
        eos_token_id=list(model.stop_ids) or None, pad_token_id=0
    )
    try:
        yield
    finally:
        model.hf.generation_config = kept


@_check("greedy decoding = HookedTransformer.generate (logit gap where tokens differ)")
def _decoding_lens(b: Bench) -> Result:
    return _greedy(
        b,
        lambda ids: b.model.hooked.generate(
            ids,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            verbose=False,
            prepend_bos=False,
            stop_at_eos=False,
        ),
    )


def _greedy(b: Bench, generate: Callable[[Tensor], Any]) -> Result:
    """Largest gap between the two candidates' logits where greedy texts part, their ends included;
    0 if they agree. Numbers that round differently part at near-ties alone.
    """
    worst, stops = 0.0, list(b.model.stop_ids)
    for result in b.results:
        if result.row.steer:
            continue
        ids = torch.tensor([b.model.encode(result.row.prompt).ids], device=b.model.device)
        with torch.no_grad():
            theirs = generate(ids)[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(theirs) if token in stops), len(theirs))
        # None stands for any of the ids that end an answer
        wanted = [*theirs[:end], *[None] * (end < len(theirs))]
        mine = [*result.token_ids, *[None] * (result.finish == "stop")]
        if mine == wanted:
            continue
        parted = [i for i, (x, y) in enumerate(zip(mine, wanted, strict=False)) if x != y]
        if not parted or set(stops) & set(result.token_ids):
            return math.inf, 0.0  # one goes on where the other ended, with no token to compare
        at = parted[0]
        logits = b.last([result.row], [result.token_ids[:at]])[0]
        x, y = (logits[stops if t is None else t].max() for t in (mine[at], wanted[at]))
        worst = max(worst, float((x - y).abs()))
    return worst, 2e-3 if b.exact else 2 * b.close()


@_check("clamp reaches its target")
def _clamp(b: Bench) -> Result:
    return _projection(b, "clamp", b.length)


@_check("ablation leaves no projection")
def _ablation(b: Bench) -> Result:
    return _projection(b, "ablate", 0.0)


def _projection(b: Bench, operator: str, target: float) -> Result:
    site = b.site("resid_post")
    row = Row(b.prompts[0], (steer(operator, b.first, coefficient=target, at=[site]),))
    x = b.engine.score([row], [b.answers[0]], taps=[site])[0].taps[site][1:].float()
    relative = ((x @ b.first.unit - target).abs() / x.norm(dim=-1).clamp_min(1)).max()
    return float(relative), 1e-5 if b.exact else 2.0**-8


@_check("the same batch twice is bit-equal, sampled")
def _twice(b: Bench) -> Result:
    sampling = Sampling(
        temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_new_tokens=NEW_TOKENS
    )
    rows = [Row(r.prompt, r.steer, sampling, seed) for seed, r in enumerate(b.rows)]
    one, two = ([r.token_ids for r in b.engine.generate(rows)] for _ in range(2))
    return float(sum(x != y for x, y in zip(one, two, strict=True))), 0.0


@_check("nothing is left on the model after an exception")
def _clean(b: Bench) -> Result:
    """Broken off in every component of a block, while reading a prompt and while decoding, and in
    a hook of TransformerLens.
    """

    class Stop(Exception):
        pass

    class Failing:
        def __init__(self, component: str) -> None:
            self.hooks = {(component, b.layer)}

        def __call__(self, hook: object, x: object, places: object) -> None:
            raise Stop

    def fails(x: Tensor, hook: object) -> None:
        raise Stop

    before, logits = _state(b.model), b.last([b.rows[0]], [b.answers[0]])
    row = Row(b.prompts[0], (steer("ablate", b.first, at=[b.site("attn_out")]),))
    steered = b.engine.admission.steered(row)
    token = torch.tensor([b.answers[0][0]], device=b.model.device)
    with torch.no_grad():
        for component in ("resid_pre", "z", "attn_out", "mlp_out", "resid_post"):
            with contextlib.suppress(Stop):
                Decoding(b.model).read([steered], [1], Failing(component))
            decoding = Decoding(b.model)
            decoding.advance(0, decoding.read([steered], [1]))
            with contextlib.suppress(Stop):
                decoding.step(token, Failing(component))
    made = hooks.fwd_hooks(b.model, row.steer, row.prompt)
    ids = torch.tensor([b.sequence(row, ())], device=b.model.device)
    with contextlib.suppress(Stop), b.model.hooked.hooks(fwd_hooks=made):
        b.model.hooked.run_with_hooks(ids, fwd_hooks=[(b.site("mlp_out").hook_name, fails)])
    after = _state(b.model)
    left = sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())
    return left + b.apart(b.last([b.rows[0]], [b.answers[0]]), logits), 0.0


def _state(model: SteeringModel) -> dict[str, object]:
    """What a pass could leave behind: on modules and weights of both views, and in torch."""
    found: dict[str, object] = {
        "attention": model.hf.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "fingerprint": model.fingerprint,
    }
    views: list[tuple[str, torch.nn.Module]] = [("hf", model.hf), ("hooked", model.hooked)]
    for view, whole in views:
        for name, module in whole.named_modules():
            registered = *module._forward_hooks, *module._forward_pre_hooks
            found[f"{view} {name}"] = module.training, registered
        for name, weight in [*whole.named_parameters(), *whole.named_buffers()]:
            at = weight.data_ptr(), weight.requires_grad, weight.grad is None
            found[f"{view} {name} weight"] = at
    return found


@_check("engine = TransformerBridge hooks")
def _bridge(b: Bench) -> Result | None:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    # The bridge takes its model apart; it gets a copy of the modules around the same weights.
    shared = {id(p): p for p in b.model.hf.parameters()}
    twin = copy.deepcopy(b.model.hf, shared)
    bridge = TransformerBridge.boot_transformers(
        b.model.name,
        hf_model=twin,
        tokenizer=copy.deepcopy(b.model.tokenizer),
        device=str(b.model.device),
        dtype=b.model.dtype,
    )
    row = next(i for i, r in enumerate(b.rows) if r.steer == (b.add(),))
    ids = torch.tensor([b.sequence(b.rows[row], b.answers[row])], device=b.model.device)
    steering = hooks.fwd_hooks(b.model, b.rows[row].steer, b.rows[row].prompt)
    with torch.no_grad(), bridge.hooks(fwd_hooks=steering):
        logits = bridge(ids, return_type="logits")[:, -1].float().cpu()
    return b.apart(b.alone[row : row + 1], logits), b.close()


@_check("last logits = those on the CPU")
def _on_cpu(b: Bench) -> Result | None:
    if b.model.device.type in ("cpu", "cuda"):
        return None  # what the tests, and those who made this, run on
    return b.apart(b.alone, b.on_cpu), b.close()


def verify(model: SteeringModel, report: Report | None = None) -> list[Check]:
    """Runs every check that applies to the model.

    Args:
        report: called with the number of checks done.
    """
    bench = Bench(model)
    done = []
    for number, (name, function) in enumerate(CHECKS, start=1):
        found = function(bench)
        if found is not None:
            done.append(Check(name, *(float(x) for x in found)))
        if report:
            report(number)
    return done
