"""Rows in work: checked against the model, gated, and watched if they ask for activations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from interp_steer.engine.bank import Hook, Steered, Steering
from interp_steer.engine.decoding import Seat
from interp_steer.engine.forward import Place
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.encoder import Encoders
from interp_steer.steering.intervention import Gate, Intervention


@dataclass(eq=False)
class Live:
    """A row in work."""

    id: int
    row: Row
    prompt: Encoded
    steering: Steering  # without interventions whose gate stayed shut
    taps: tuple[Site, ...]
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    seen: dict[Site, list[Tensor]] = field(default_factory=dict)
    seat: Seat | None = None

    @property
    def left(self) -> int:
        return self.row.sampling.max_new_tokens - len(self.tokens)

    @property
    def steered(self) -> Steered:
        return self.steering, self.prompt


class Taps:
    """Activations of the rows that asked for them: gathered on the device, copied all at once."""

    def __init__(self, rows: Sequence[Live]) -> None:
        self.rows = rows
        self.hooks: set[Hook] = {(s.component, s.layer) for live in rows for s in live.taps}
        self.parts: list[tuple[Hook, list[tuple[Live, int]], Tensor]] = []
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, hook: Hook, x: Tensor, places: Sequence[Place]) -> None:
        wanted = [
            (self.rows[row], entry, n)
            for row, entry, n in places
            if self.rows[row].finish is None
            and any((site.component, site.layer) == hook for site in self.rows[row].taps)
        ]
        entries = tuple(entry for _, entry, _ in wanted)
        if entries not in self._indices:
            self._indices[entries] = torch.tensor(entries, dtype=torch.long).to(x.device)
        part = x[self._indices[entries]]
        self.parts.append((hook, [(live, n) for live, _, n in wanted], part))

    def take(self) -> list[tuple[Live, Site, Tensor]]:
        """What was gathered since the last call, on the CPU: row, site, `[pos, d]`."""
        parts, self.parts = self.parts, []
        if not parts:
            return []
        flat = torch.cat([part.reshape(-1) for _, _, part in parts]).cpu()
        found = []
        for (hook, rows, part), numbers in zip(
            parts, flat.split([part.numel() for _, _, part in parts]), strict=True
        ):
            for (live, n), mine in zip(rows, numbers.view(part.shape), strict=True):
                for site in live.taps:
                    if (site.component, site.layer) == hook:
                        values = mine[:n] if site.head is None else mine[:n, site.head]
                        found.append((live, site, values))
        return found


def watching(rows: Sequence[Live]) -> Taps | None:
    """Taps of rows, if any has asked."""
    return Taps(rows) if any(live.taps for live in rows) else None


class Admission:
    """Lets rows in: checks them against the model, and judges their gates once a prompt.

    The latest verdicts are kept while the weights stay as they are.
    """

    KEPT = 4096
    TOGETHER = 16

    def __init__(
        self, model: SteeringModel, computes: bool = True, encoders: Encoders | None = None
    ) -> None:
        """`computes` is False to check rows only, which needs no weights."""
        if computes and not model.has_weights:
            raise RequestError(f"{model.name or 'this model'} has no weights (they are on 'meta')")
        self.model, self._encoders = model, encoders
        self._device = model.device if computes else torch.device("cpu")
        self._steerings: WeakValueDictionary[tuple[object, ...], Steering] = WeakValueDictionary()
        self._verdicts: dict[tuple[tuple[int, ...], Gate], bool] = {}
        self._judged = ""  # the fingerprint of the weights that gave the verdicts

    def steering(self, interventions: Sequence[Intervention]) -> Steering:
        """Interventions as steps: one object for all rows in work that have the same.

        Raises:
            RequestError: interventions that cannot be joined; see `Steering`.
        """
        key = tuple(
            (one.operator, one.value, one.unit, one.sites, one.scope, *map(id, one.directions))
            for one in interventions
        )
        known = self._steerings.get(key)
        if known is None:
            known = Steering(interventions, self._device, self._encoders)
            self._steerings[key] = known
        return known

    def steered(self, row: Row) -> Steered:
        """A row as forward passes take it: checked, without interventions whose gate is shut."""
        live = self.take(0, row, ())
        self.judge([live])
        return live.steered

    def take(self, id: int, row: Row, taps: Sequence[Site], new: int = 0) -> Live:
        """Checks a row against the model, before anything runs.

        Args:
            new: tokens that will follow the prompt, generated or given.
        """
        prompt = self.model.encode(row.prompt)
        if len(prompt.ids) + new > self.model.n_ctx:
            raise RequestError(
                f"the prompt ({len(prompt.ids)} tokens) and {new} new tokens exceed the context "
                f"of {self.model.name}, {self.model.n_ctx} tokens"
            )
        for one in row.steer:
            one.check(self.model)
            if one.unit not in ("", "deg"):
                raise RequestError(
                    f"{one} has no length yet: resolve it with .resolve(Scale.of(model, prompts))"
                )
            if one.scope.kind == "content" and not prompt.located:
                raise RequestError(
                    f"{one}: the chat template rewrites messages, so that their content cannot be "
                    "told from the template; use another scope, such as 'prompt'"
                )
        for site in taps:
            self.model.check(site, self.model.d_model if site.head is None else self.model.d_head)
        return Live(id, row, prompt, self.steering(row.steer), tuple(taps))

    def judge(self, lives: Sequence[Live]) -> None:
        """Judges every gate on its unsteered prompt, once, and drops what stays shut."""
        gated = [(live, one.gate) for live in lives for one in live.row.steer if one.gate]
        if not gated:
            return
        if self._judged != self.model.fingerprint:
            self._verdicts, self._judged = {}, self.model.fingerprint
        opens = {
            (live.prompt.ids, gate): self._verdicts.get((live.prompt.ids, gate))
            for live, gate in gated
        }
        asked: dict[Encoded, list[Gate]] = {}
        for live, gate in gated:
            if opens[live.prompt.ids, gate] is None:
                asked.setdefault(live.prompt, []).append(gate)
        prompts = sorted(asked, key=lambda prompt: len(prompt.ids))
        for start in range(0, len(prompts), self.TOGETHER):
            some = prompts[start : start + self.TOGETHER]
            wanted = list(dict.fromkeys(gate for prompt in some for gate in asked[prompt]))
            verdicts = self._means(some, wanted)
            opens |= {(p.ids, g): v for (p, g), v in verdicts.items() if g in asked[p]}
        self._verdicts |= {key: bool(verdict) for key, verdict in opens.items()}
        for oldest in list(self._verdicts)[: -self.KEPT]:
            del self._verdicts[oldest]
        for live in lives:
            kept = [
                one
                for one in live.row.steer
                if one.gate is None or opens[live.prompt.ids, one.gate]
            ]
            if len(kept) < len(live.row.steer):
                live.steering = self.steering(kept)

    def _means(
        self, prompts: Sequence[Encoded], gates: Sequence[Gate]
    ) -> dict[tuple[Encoded, Gate], bool]:
        """Whether each gate opens on each prompt, from one pass up to the last gate's layer."""
        reads = [gate.site.block - 1 for gate in gates]  # what the block before leaves
        means: list[Tensor] = [torch.zeros(0)] * len(gates)
        for layer, x, real in self.model.residuals(prompts):
            for n, gate in enumerate(gates):
                if reads[n] == layer:
                    cosine = torch.cosine_similarity(
                        x[:, 1:].float(), gate.vector.to(x.device)[None, None], dim=-1
                    )
                    total = cosine.where(real[:, 1:], 0).sum(-1)
                    means[n] = total / real[:, 1:].sum(-1).clamp_min(1)
            if layer == max(reads):
                break
        return {
            (prompt, gate): mean > gate.threshold if gate.above else mean < gate.threshold
            for gate, column in zip(gates, torch.stack(means).tolist(), strict=True)
            for prompt, mean in zip(prompts, column, strict=True)
        }
