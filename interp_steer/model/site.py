"""Places in the model that can be read and changed, named as TransformerLens does."""

import re
from dataclasses import dataclass

from interp_steer.errors import RequestError, nearest

COMPONENTS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
"""What can be read and changed in a block, named as TransformerLens does."""

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}

# transformers' names of modules whose output is one of these
_MODULE = re.compile(
    r"(?:(?:language_)?model\.)*layers\.(\d+)(?:\.(mlp|self_attn|self_attn\.o_proj))?(?:\.output)?"
)
_OUTPUTS = {
    None: "resid_post", "mlp": "mlp_out", "self_attn": "attn_out", "self_attn.o_proj": "attn_out"
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model: component x layer x head; `z` needs a head, the others have none."""

    component: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise RequestError(
                f"unknown component {self.component!r}{nearest(self.component, COMPONENTS)}"
            )
        if self.layer < 0 or (self.head or 0) < 0:
            raise RequestError(f"layers and heads count from 0, got {self}")
        if (self.component == "z") != (self.head is not None):
            raise RequestError("a site at z names a head, such as 'z 15h3'; no other site does")

    @property
    def block(self) -> int:
        """The first block that a change here reaches: its own, or behind `resid_post` the next."""
        return self.layer + (self.component == "resid_post")

    @property
    def hook_name(self) -> str:
        """TransformerLens's hook name; `z` is one hook for all heads of a block."""
        return f"blocks.{self.layer}.{_HOOKS[self.component]}"

    @property
    def hook_point(self) -> str:
        """The hook name, with the head's number after it at `z`."""
        return self.hook_name + ("" if self.head is None else f".{self.head}")

    @property
    def module(self) -> str | None:
        """Transformers' name, within the model, of the module whose output it is; None for `z`."""
        if self.component == "resid_pre":
            return f"layers.{self.layer - 1}" if self.layer else "embed_tokens"
        for part, component in _OUTPUTS.items():
            if component == self.component:
                return f"layers.{self.layer}" + (f".{part}" if part else "")
        return None

    @classmethod
    def parse(cls, hook_point: str) -> "Site":
        """From `blocks.15.hook_resid_post`, or the name of a module of transformers whose output
        it is: `model.layers.15`, and `.mlp` and `.self_attn` of it.

        Raises:
            RequestError: any other text.
        """
        for component, hook in _HOOKS.items():
            found = re.fullmatch(rf"blocks\.(\d+)\.{re.escape(hook)}(?:\.(\d+))?", hook_point)
            if found:
                layer, head = found.groups()
                return cls(component, int(layer), None if head is None else int(head))
        if found := _MODULE.fullmatch(hook_point):
            return cls(_OUTPUTS[found[2]], int(found[1]))
        raise RequestError(
            f"unknown hook point {hook_point!r}; expected such as 'blocks.15.hook_resid_post'"
        )

    def __str__(self) -> str:
        return f"{self.component} {self.layer}" + ("" if self.head is None else f"h{self.head}")
