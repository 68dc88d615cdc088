"""What tells one set of weights from another, also after somebody changed them in place."""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# transformers puts its own version among a model's settings. The one that wrote the first runs
# stands for all of them: a newer library does not make another model of the same weights.
WRITTEN_WITH = "5.24.0"


class Fingerprint:
    """A short hash of a model's configuration and of a sample of every weight matrix.

    All weights are read when it is made. Asking takes a millisecond or two: samples are compared,
    and torch's count of changes of every weight. Where these differ, what was changed since it was
    made is hashed too, by the sums of its rows, so that a change between the samples counts. A
    change between the samples that torch does not count (through `.data`) is seen by `anew` alone.
    """

    def __init__(self, hf: "LlamaForCausalLM") -> None:
        self._hf = hf
        self._first: dict[str, str] = {}
        self._found = ""
        self._seen: list[tuple[torch.nn.Module, str, Tensor, tuple[int, int]]] = []
        self._samples: list[Tensor] = []
        self._read = torch.empty(0)
        if not any(weight.is_meta for weight in hf.parameters()):
            self._measure()

    def __str__(self) -> str:
        return self.anew() if not self._found or self._changed() else self._found

    def anew(self) -> str:
        """The same after reading all weights again."""
        self._measure()
        return self._found

    def _changed(self) -> bool:
        same = all(
            module._parameters.get(name) is weight and _state(weight) == state
            for module, name, weight, state in self._seen
        )
        return not (same and torch.equal(torch.cat(self._samples), self._read))

    @torch.no_grad()
    def _measure(self) -> None:
        config = {**self._hf.config.to_diff_dict(), "transformers_version": WRITTEN_WITH}
        digest = hashlib.sha256(repr(sorted(config.items())).encode())
        weights = dict(self._hf.named_parameters())
        # views: they follow what is written to the weights, also through `.data`
        self._samples = [
            w.detach().reshape(-1)[:: max(1, w.numel() // 64)][:64] for w in weights.values()
        ]
        for sample in self._samples:
            digest.update(sample.float().cpu().numpy().tobytes())
        self._read = torch.cat(self._samples)
        sums = {name: _sums(weight) for name, weight in weights.items()}
        self._first = self._first or sums
        for name, found in sums.items():
            if found != self._first.get(name):
                digest.update(f"{name} {found}".encode())
        self._seen = [
            (module, name, weight, _state(weight))
            for module in self._hf.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self._found = digest.hexdigest()[:16]


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies, and how often it was written to."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _sums(weight: Tensor) -> str:
    rows = weight.detach().reshape(-1, weight.shape[-1])
    # some at once: to sum in another format, torch makes a copy in it
    sums = torch.cat([some.sum(-1, dtype=torch.float32) for some in rows.split(256)])
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]
