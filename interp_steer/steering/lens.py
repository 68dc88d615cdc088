"""Whole Jacobian lenses: a matrix a layer, in the files that others publish.

    lens = JacobianLens.load("Llama-3.1-8B-Instruct_jacobian_lens.pt", model)
    lens.word(model, "Eiffel", 15)

What J is stands in `jacobian`. A word's direction needs no lens (`jacobian.word_directions`); a
lens reads any activation, `unembed(final_norm(J x))`, where the logit lens takes J = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError, RunError, note
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.direction import Direction
from interp_steer.steering.jacobian import (
    LENGTH,
    READOUT,
    SKIP,
    named,
    pulled,
    readout,
    source_layers,
    token_of,
)
from interp_steer.util.console import Report, watched
from interp_steer.util.files import whole


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """J of some layers, as published lens files hold them; a layer is read when it is asked for.

    Attributes:
        layers: the source layers.
        d_model: the width.
        n_prompts: how many texts it was fitted on; 0 where the file does not say.
        about: what the file says of itself.
    """

    layers: tuple[int, ...]
    d_model: int
    n_prompts: int
    about: dict[str, Any] = field(default_factory=dict)
    _matrices: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """J of a layer in float32, on the CPU: `J[layer] @ x`."""
        if layer not in self.layers:
            raise RequestError(
                f"the lens has no layer {layer}; it has {self.layers[0]}-{self.layers[-1]}"
            )
        return self._matrices[layer].float()

    @classmethod
    def fit(
        cls,
        model: SteeringModel,
        texts: Sequence[Encoded],
        *,
        layers: Sequence[int] | None = None,
        skip: int = SKIP,
        length: int = LENGTH,
        report: Report | None = None,
    ) -> "JacobianLens":
        """J of layers, by d_model backward passes a text: a GPU's work but for the smallest models.

        Args:
            As for `word_directions`; `report` is called with the number of texts done.
        """
        chosen = source_layers(model, layers)
        rows = torch.eye(model.d_model, device=model.device)
        total = torch.zeros(model.d_model, len(chosen), model.d_model)
        with watched("reading texts", len(texts), report) as told:
            done = 0
            for n, part in pulled(model, texts, chosen, rows, skip, length, together=1):
                total += part
                done = n + 1
                if told:
                    told(done)
        mean = total / done
        about = {
            "model_name": model.name, "model_revision": model.revision,
            "hook_convention": "blocks.{layer}.hook_out", "target_layer": model.n_layers - 1,
            "max_seq_len": length, "skip_first_positions": skip, "estimator": "exact rows",
            "fit_dtype": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip
        matrices = {layer: mean[:, i].contiguous() for i, layer in enumerate(chosen)}
        return cls(tuple(chosen), model.d_model, done, about, matrices)

    def save(self, path: str | Path) -> Path:
        """Writes float16 matrices as published files hold them, whole or not at all."""
        state = {
            "J": {layer: self._matrices[layer].half() for layer in self.layers},
            "n_prompts": self.n_prompts, "source_layers": list(self.layers),
            "d_model": self.d_model, "metadata": self.about,
        }  # fmt: skip
        with whole(Path(path)) as part:
            torch.save(state, part)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: SteeringModel | None = None) -> "JacobianLens":
        """Opens a lens file; its matrices stay on disk until a layer is asked for.

        Args:
            model: what it must fit: width, layers, and that it ends at the last block.

        Raises:
            RequestError: no such file, none of this kind, or a lens that does not fit the model.
        """
        path = Path(path)
        if not path.is_file():
            raise RequestError(f"no lens file {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            said = str(error).splitlines()[0][:80]
            raise RunError(f"{path} cannot be read as a lens (torch.save): {said}") from None
        return cls._of(state, path, model)

    @classmethod
    def _of(cls, state: Any, path: Path, model: SteeringModel | None) -> "JacobianLens":
        if isinstance(state, dict) and "jacobian_sum" in state:
            raise RequestError(
                f"{path} is a checkpoint of a fit that was not ended; finish the fit and take its "
                "lens"
            )
        given = state.get("J") if isinstance(state, dict) else None
        if not isinstance(given, dict) or not given:
            raise RequestError(f"{path} is no Jacobian lens: it has no 'J' by layer")
        matrices = {int(layer): matrix for layer, matrix in given.items()}
        widths = {tuple(matrix.shape) for matrix in matrices.values()}
        width = next(iter(widths))
        if len(widths) > 1 or len(width) != 2 or width[0] != width[1]:
            raise RequestError(f"{path} holds matrices of other shapes than [d_model, d_model]")
        about = state.get("metadata") or state.get("provenance") or {}
        about = dict(about) if isinstance(about, dict) else {}
        if (target := state.get("target_layer")) is not None:
            about.setdefault("target_layer", target)
        lens = cls(
            tuple(sorted(matrices)), width[0], int(state.get("n_prompts") or 0), about, matrices
        )
        if model:
            lens.check(model, str(path))
        return lens

    def check(self, model: SteeringModel, name: str = "the lens") -> None:
        """Raises RequestError where it cannot be a lens of the model; warns of another's name."""
        last = model.n_layers - 1
        if self.d_model != model.d_model:
            raise RequestError(
                f"{name} is {self.d_model} wide and {model.name} {model.d_model}: it is another "
                "model's"
            )
        if self.layers[-1] >= last:
            raise RequestError(
                f"{name} has layer {self.layers[-1]}; after the last block of {model.name}, "
                f"{last}, the Jacobian is the identity and no lens holds it: this one was fitted "
                "elsewhere (at a head's output, or on a deeper model)"
            )
        if self.about.get("target_layer") not in (None, last):
            raise RequestError(
                f"{name} ends at layer {self.about['target_layer']}, not after the last block, "
                f"{last}"
            )
        said = str(self.about.get("model_name") or "")
        if said and said.split("/")[-1] != model.name.split("/")[-1]:
            note(f"{name} was fitted on {said}; a lens of another checkpoint may mislead")

    def read(
        self, model: SteeringModel, layer: int, x: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_vocab"]:
        """Logits unembed(final_norm(J x)) of streams after a block; after the last one the
        model's own.
        """
        if layer < model.n_layers - 1:
            x = x.float() @ self[layer].T.to(x.device)
        return model.unembed(x.to(model.dtype))

    def word(
        self, model: SteeringModel, word: str, layer: int, published: bool = False
    ) -> Direction:
        """The direction of a word at a layer, r J; see `jacobian`.

        Raises:
            RequestError: a word of several tokens, or a layer that the lens has not.
        """
        token = token_of(model, word)
        row = readout(model, [token], published)[0].cpu()
        source = {
            "method": "jacobian-lens, from a file", "model": model.name, "word": word.strip(),
            "token": str(token), "texts": str(self.n_prompts),
            "readout": READOUT[published],
        }  # fmt: skip
        vector = row @ self[layer]
        return Direction.of(vector, f"blocks.{layer}.hook_resid_post", named(word), source)
