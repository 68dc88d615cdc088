"""What an intervention does to activations: pure functions on `[batch, pos, d_model]`.

Every row of the batch brings its own operands. Notation: `x` is the activation, `v` a unit
direction, `a` the coefficient. Lengths and projections are computed in float32; what is added is
cast to the activation's own format, so that a bfloat16 stream stays one. Exact to the bit: add,
norm-kept add and rotate at 0 return `x`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError

Stream = Float[Tensor, "batch pos d_model"]
PerRow = Float[Tensor, "batch d_model"]

# Above this condition number of the directions' Gram matrix, holding all targets at once takes
# steps so long that they destroy the stream.
MAX_CONDITION = 1e4


def add(x: Stream, delta: PerRow) -> Stream:
    """x + a v, with `delta` = a v (activation addition: Turner et al. 2023, arXiv 2308.10248)."""
    return x + delta.to(x.dtype)[:, None]


def add_norm_kept(x: Stream, delta: PerRow) -> Stream:
    """x' = x + a v, then x' |x| / |x'|: turns the stream towards v and keeps its length.

    The ratio is formed first, so that a = 0 multiplies by exactly 1; a zero x' stays zero.
    """
    moved = add(x, delta)
    wide = moved.float()
    length = wide.norm(dim=-1, keepdim=True)
    ratio = torch.where(length > 0, x.float().norm(dim=-1, keepdim=True) / length, 1.0)
    kept: Tensor = (wide * ratio).to(x.dtype)
    return kept


def clamp(
    x: Stream,
    directions: Float[Tensor, "batch k d_model"],
    dual: Float[Tensor, "batch k d_model"],
    low: Float[Tensor, "batch k"],
    high: Float[Tensor, "batch k"],
) -> Stream:
    """x + V+ (c - V x): every projection x.v_i ends between `low` and `high`, all at once.

    With low = high = a this is the clamp of "The Eiffel Tower Llama" for one direction and the
    joint clamp for several: one after the other would be wrong for directions that are not
    orthogonal. a = 0 is ablation (Arditi et al. 2024, arXiv 2406.11717). One-sided clamps leave
    low or high infinite.
    """
    projection = torch.einsum("bpd,bkd->bpk", x.float(), directions)
    target = projection.clamp(low[:, None], high[:, None])
    step = torch.einsum("bpk,bkd->bpd", target - projection, dual)
    return x + step.to(x.dtype)


def latent_clamp(
    x: Stream,
    latents: Float[Tensor, "batch pos k"],
    rows: Float[Tensor, "batch k d_model"],
    targets: Float[Tensor, "batch k"],
) -> Stream:
    """x + sum_i (c_i - f_i(x)) d_i: as if SAE latent i had the value c_i (Templeton et al. 2024).

    `latents` are f_i(x), `rows` the decoder rows d_i at their own length, c in activation units.
    What the SAE does not reconstruct stays in x, so no error term is added. Not the projection
    clamp: f_i is 0 almost everywhere, and encoding the result again need not give c.
    """
    step = torch.einsum("bpk,bkd->bpd", targets[:, None] - latents, rows)
    return x + step.to(x.dtype)


def rotate(
    x: Stream, plane: Float[Tensor, "batch two d_model"], angle: Float[Tensor, " batch"]
) -> Stream:
    """Turns the part of x in the plane of b1, b2 by a relative angle, from b1 towards b2."""
    p = torch.einsum("bpd,bkd->bpk", x.float(), plane)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = torch.stack([cos * p[..., 0] - sin * p[..., 1], sin * p[..., 0] + cos * p[..., 1]], -1)
    return x + torch.einsum("bpk,bkd->bpd", turned - p, plane).to(x.dtype)


def angular(
    x: Stream, plane: Float[Tensor, "batch two d_model"], angle: Float[Tensor, " batch"]
) -> Stream:
    """x - Px + |Px| (cos f b1 + sin f b2): sets the absolute angle f in the plane of b1, b2.

    Angular steering, Vu et al. 2025 (arXiv 2510.26243). Both angular operators keep |x|.
    """
    p = torch.einsum("bpd,bkd->bpk", x.float(), plane)
    radius = p.norm(dim=-1, keepdim=True)
    turned = radius * torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    return x + torch.einsum("bpk,bkd->bpd", turned - p, plane).to(x.dtype)


def dual_basis(
    directions: Float[Tensor, "k d_model"], names: str = "the directions"
) -> Float[Tensor, "k d_model"]:
    """(V V')^-1 V: moving along its rows changes one projection and leaves the others.

    Raises:
        RequestError: the directions are nearly parallel (condition number above 1e4).
    """
    gram = directions.double() @ directions.double().T
    if len(gram) > 1:
        condition = float(torch.linalg.cond(gram))
        if not condition <= MAX_CONDITION:
            raise RequestError(
                f"{names} are nearly parallel (condition number {condition:.1e}, at most "
                f"{MAX_CONDITION:.0e}): they cannot be clamped to separate targets"
            )
    solved = torch.cholesky_solve(directions.double(), torch.linalg.cholesky(gram))
    return solved.float()


def orthonormal_plane(
    first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"], names: str
) -> Float[Tensor, "two d_model"]:
    """b1 along the first direction, b2 the second's part at right angles to it.

    Raises:
        RequestError: the directions are (nearly) parallel and span no plane.
    """
    b1 = first.double() / first.double().norm()
    rest = second.double() - torch.dot(second.double(), b1) * b1
    if rest.norm() < 1e-2:
        raise RequestError(f"{names} are nearly parallel: they span no plane to turn in")
    return torch.stack([b1, rest / rest.norm()]).float()
