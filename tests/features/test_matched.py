"""Features alike to another one, as controls."""

import re
from dataclasses import replace

import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.steering.direction import Direction
from tests.study.samples import direction


def test_matched_features_are_alike(starter):
    from interp_steer.features.feature import feature
    from interp_steer.features.matched import matched_features

    own = feature("starter", 2652, name="paris")
    found = matched_features(own, 20)
    assert len({d.source["index"] for d in found} - {"2652"}) == 20
    from interp_steer.features.sae import Sae

    rows = Sae.of(own).rows(torch.tensor([int(d.source["index"]) for d in found]))
    for one, row in zip(found, rows, strict=True):
        assert torch.allclose(one.vector, row, atol=1e-6)
        density = float(one.source["density"])
        assert one.name.startswith("paris-like") and 0.005 < density < 0.05  # 2652's is 0.015
    with pytest.raises(RequestError, match="no feature of an SAE"):
        matched_features(direction(), 3)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"neuronpedia": "llama3.1-8b/15-llamascope-res-32k/5"},
         "run `interp-steer labels sync llama3.1-8b/15-llamascope-res-32k --numbers`, or set"),
        ({}, "its SAE has no labels on Neuronpedia: set controls"),
    ],
)  # fmt: skip
def test_how_features_could_be_matched_is_told(tmp_path, monkeypatch, source, said):
    from interp_steer.features.matched import matched_features

    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    source = {"release": "llama_scope_lxr_8x", "sae_id": "l15r_8x", "index": "5", **source}
    with pytest.raises(RequestError, match=re.escape(said)):
        matched_features(replace(direction(), source=source), 3)


def test_fewer_known_features_than_controls_are_told(monkeypatch, tmp_path):
    from interp_steer.features.matched import matched_features
    from interp_steer.labels.label import Source
    from interp_steer.labels.rows import Row
    from interp_steer.labels.store import Store

    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path))
    with Store(write=True) as store:
        rows = [
            Row("m", "3-res", i, f"e{i}", "x", density=0.1, max_activation=1.0) for i in range(4)
        ]
        store.commit(Source("m", "3-res"), "a", "1", rows)
    source = {"release": "r", "sae_id": "s", "index": "1", "neuronpedia": "m/3-res/1"}
    one = Direction.of(direction().vector, "blocks.2.hook_resid_post", "f", source)
    with pytest.raises(RequestError, match=r"known of 3 other features.*expected 4.*features: 3"):
        matched_features(one, 4)
