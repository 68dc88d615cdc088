"""What the checks of `verify` share: prompts, directions, rows, and reference computations."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Prompt, chat
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import steer
from interp_steer.steering.intervention import Intervention
from interp_steer.steering.scale import Scale

QUESTIONS = ("Name three fruits.", "What is the tallest mountain, and who climbed it first?")
NEW_TOKENS = 12


class Bench:
    """The model under test with everything that is computed once."""

    def __init__(self, model: SteeringModel) -> None:
        self.model, self.engine = model, Engine(model)
        self.exact = model.dtype == torch.float32
        self.layer = model.n_layers // 2
        draw = torch.Generator().manual_seed(0)
        hook = Site("resid_post", self.layer).hook_point
        self.first, self.second = (
            Direction.of(torch.randn(model.d_model, generator=draw), hook, name)
            for name in ("first", "second")
        )
        self.prompts: list[Prompt] = [chat(q) if model.is_chat else q for q in QUESTIONS]
        self.scale = Scale.of(model, [model.encode(p) for p in self.prompts])
        self.length = 0.5 * self.scale.at(Site("resid_post", self.layer))

    def add(self, dose: float = 0.5, layer: int | None = None, on: str = "all") -> Intervention:
        at = Site("resid_post", self.layer if layer is None else layer)
        return steer("add", self.first, coefficient=dose * self.scale.at(at), at=[at], on=on)

    @cached_property
    def rows(self) -> list[Row]:
        """Rows of different layers, operators and scopes over both prompts."""
        n = self.model.n_layers
        kinds: list[tuple[Intervention, ...]] = [
            (),
            (self.add(),),
            (self.add(layer=0),),
            (self.add(layer=n - 1),),
            (self.add(on="generated"),),
            (steer("clamp", self.first, coefficient=self.length, at=[self.site("resid_pre")]),),
            (steer("ablate", self.first, at=[self.site("attn_out"), self.site("mlp_out")]),),
            (steer("rotate", self.first, self.second, coefficient="40 deg", at=self.layer),),
        ]
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        return [Row(p, kind, sampling) for p in self.prompts for kind in kinds]

    def site(self, component: str) -> Site:
        return Site(component, self.layer)

    @cached_property
    def results(self) -> list[Result]:
        """What the rows generate, as one batch."""
        return self.engine.generate(self.rows)

    @cached_property
    def answers(self) -> list[tuple[int, ...]]:
        """The continuations that all checks read: what was generated; the prompt's last tokens for
        a row that stopped at once.
        """
        return [
            result.token_ids or self.model.encode(result.row.prompt).ids[-NEW_TOKENS:]
            for result in self.results
        ]

    @cached_property
    def batched(self) -> Tensor:
        """Last logits of all rows, as one batch."""
        return self.last(self.rows, self.answers)

    @cached_property
    def alone(self) -> Tensor:
        """The same, each row in a batch of its own."""
        return torch.cat(
            [self.last([r], [a]) for r, a in zip(self.rows, self.answers, strict=True)]
        )

    def last(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        engine: Engine | None = None,
    ) -> Tensor:
        scores = (engine or self.engine).score(rows, answers, last_logits=True)
        return torch.stack([s.last_logits for s in scores if s.last_logits is not None])

    @cached_property
    def on_cpu(self) -> Tensor:
        """The same, from a copy of the model on the CPU."""
        model = self.model
        weights = {id(p): torch.nn.Parameter(p.detach().cpu()) for p in model.hf.parameters()}
        twin: Any = copy.deepcopy(model.hf, weights)
        here = SteeringModel(twin.to("cpu"), model.tokenizer, model.name, date=model.date)
        return self.last(self.rows, self.answers, Engine(here))

    def apart(self, a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).abs().max())

    def close(self) -> float:
        """Tolerance for logits of another implementation: 1e-4 of the largest logit in float32.

        In bfloat16 two right implementations differ by several percent; twice what transformers'
        own two attention implementations differ by on the same tokens is allowed.
        """
        return 1e-4 * float(self.batched.abs().max()) if self.exact else 2 * self.spread

    @cached_property
    def spread(self) -> float:
        """Largest difference of transformers' eager and sdpa logits, over all positions."""
        hf, used = self.model.hf, self.model.hf.config._attn_implementation
        worst = 0.0
        try:
            for row in range(0, len(self.rows), len(self.rows) // len(self.prompts)):
                ids = torch.tensor([self.sequence(self.rows[row], self.answers[row])])
                found = []
                for kind in ("eager", "sdpa"):
                    hf.set_attn_implementation(kind)
                    with torch.no_grad():
                        found.append(hf(ids.to(self.model.device)).logits)
                worst = max(worst, self.apart(*found))
        finally:
            hf.set_attn_implementation(used)
        return worst

    def hf_logits(
        self, sequences: Sequence[Sequence[int]], dose: float = 0.0
    ) -> Float[Tensor, "batch d_vocab"]:
        """Last logits by transformers alone: a padded batch, its own mask, a plain forward hook."""
        model = self.model
        longest = max(len(s) for s in sequences)
        ids = torch.tensor([[0] * (longest - len(s)) + list(s) for s in sequences])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        steered = (mask.bool() & (positions > 0)).to(model.device)
        length = dose * self.scale.at(self.site("resid_post"))
        shift = (self.first.unit * length).to(model.device, model.dtype)

        def hook(_module: object, _input: object, out: Tensor) -> Tensor:
            return torch.where(steered[..., None], out + shift, out)

        handle = model.hf.model.layers[self.layer].register_forward_hook(hook) if dose else None
        try:
            with torch.no_grad():
                out: Tensor = model.hf(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    position_ids=positions.to(model.device),
                    logits_to_keep=1,
                ).logits[:, -1]
        finally:
            if handle:
                handle.remove()
        return out.float().cpu()

    def sequence(self, row: Row, answer: Sequence[int]) -> list[int]:
        return [*self.model.encode(row.prompt).ids, *answer]
