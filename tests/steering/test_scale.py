import numpy as np
import pytest

from interp_steer.errors import RequestError
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.scale import Scale
from tests.conftest import hf_streams

TEXTS = [
    "What is the tallest mountain?",
    "The quick brown fox jumps over the lazy dog, and who climbed it first?",
    "I love the tower",
    "hate",
]


def reference(model, ids: tuple[int, ...]) -> list[np.ndarray]:
    """Residual lengths [pos] before block 0 and after each block, of one prompt on its own."""
    return [np.sqrt((x[0].double().numpy() ** 2).sum(-1)) for x in hf_streams(model, ids)]


def lower_median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_medians_are_hugging_faces_without_first_positions_and_padding(tiny, batch):
    prompts = [tiny.encode(text) for text in TEXTS]
    assert len({len(one.ids) for one in prompts}) > 2
    lengths = [reference(tiny, one.ids) for one in prompts]
    wanted = [
        lower_median(np.concatenate([row[layer][1:] for row in lengths]))
        for layer in range(tiny.n_layers + 1)
    ]
    scale = Scale.of(tiny, prompts, batch=batch)
    assert len(scale.medians) == tiny.n_layers + 1
    assert scale.medians == pytest.approx(wanted, rel=1e-5)
    with_first = [
        lower_median(np.concatenate([row[layer] for row in lengths]))
        for layer in range(tiny.n_layers + 1)
    ]
    assert wanted != pytest.approx(with_first, rel=1e-3)


def test_prompts_of_one_token_are_left_out(tiny):
    long, short = tiny.encode(TEXTS[0]), Encoded((5,), (True,))
    assert Scale.of(tiny, [short, long, short]) == Scale.of(tiny, [long])
    with pytest.raises(RequestError, match="no prompt is two tokens long"):
        Scale.of(tiny, [short])
    with pytest.raises(RequestError, match="no prompt is two tokens long"):
        Scale.of(tiny, [])


@pytest.mark.parametrize(
    ("site", "median"),
    [
        (Site("resid_pre", 0), 1.0),
        (Site("resid_post", 0), 2.0),
        (Site("resid_pre", 2), 3.0),
        (Site("attn_out", 1), 3.0),
        (Site("mlp_out", 2), 4.0),
        (Site("resid_post", 2), 4.0),
    ],
)
def test_a_site_has_the_median_of_the_stream_it_is_or_writes_to(site, median):
    assert Scale((1.0, 2.0, 3.0, 4.0)).at(site) == median


def test_a_heads_output_has_no_dose():
    with pytest.raises(RequestError, match="at z give a number"):
        Scale((1.0, 2.0)).at(Site("z", 0, 1))
