"""Every row of the accept table, as our grammar; what we do not do is refused."""

import base64
import json

import numpy as np
import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.export.constant import constants
from interp_steer.export.request import interp_engine, vllm_lens
from interp_steer.serve.carriers import carried
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import resolve


@pytest.fixture
def known():
    draw = np.random.default_rng(7)
    points = {"joy": "blocks.2.hook_resid_post", "sad": "blocks.2.hook_resid_post"}
    return {n: Direction.of(draw.normal(size=64) * 3, at, n) for n, at in points.items()}


def tensor(values, **more):
    raw = np.asarray(values, "<f4").tobytes()
    return {"data": base64.b64encode(raw).decode(), "dtype": "float32",
            "shape": list(np.shape(values)), **more}  # fmt: skip


def same(body, line, known):
    """Whether a request adds what a line adds, or does what it does."""
    found = resolve(carried(body, known))
    expected = resolve(parse(line, known))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.operator, one.sites, one.scope) == (other.operator, other.sites, other.scope)
        assert one.value == pytest.approx(other.value, rel=1e-5)
        for mine, theirs in zip(one.directions, other.directions, strict=True):
            assert mine.cosine(theirs) == pytest.approx(1, abs=1e-6)


def test_nothing_is_nothing(known):
    assert carried({"model": "x", "temperature": 1, "user": "me"}, known) is None
    assert carried({"steering": None, "vllm_xargs": {"other": 1}}, known) is None
    assert carried({"steering": ""}, known) == ()


def test_ours(known):
    same({"steering": "add(joy, 2) at 1; clamp(sad, 3) at 2 on prompt"},
         "add(joy, 2) at 1; clamp(sad, 3) at 2 on prompt", known)  # fmt: skip
    same({"steering": [{"vector": "joy", "layer": 3, "coefficient": 4},
                       {"vector": "sad", "layer": 1, "coefficient": 2, "scope": "generated",
                        "operator": "clamp"}]},
         "add(joy, 4) at 3; clamp(sad, 2) at 1 on generated", known)  # fmt: skip


def test_hotwire_multiplies_the_stored_vector(known):
    one = {"id": "joy", "layer": 3, "scale": 0.5}
    for given in (one, json.dumps([{**one, "decode_only": False}])):
        same({"vllm_xargs": {"hotwire": given}}, "add(joy, 0.5 raw) at 3 on all+first", known)
    with pytest.raises(RequestError, match=r"unknown vector 'jov'; nearest: joy"):
        carried({"vllm_xargs": {"hotwire": '{"id": "jov", "layer": 3}'}}, known)
    with pytest.raises(RequestError, match="decode_only"):
        carried({"vllm_xargs": {"hotwire": {"id": "joy", "layer": 3, "decode_only": True}}}, known)


def test_easysteer(known):
    vector = {"source": "joy.gguf", "algorithm": "direct", "scale": 2.0, "layers": [1, 3],
              "normalize": False, "apply": {"prompt": "all", "generation": "all"}}  # fmt: skip
    body = {"steering": {"vectors": [vector], "conflict": "priority"}}
    same(body, "add(joy, 2 raw) at 1,3 on all+first", known)
    prompt = {**vector, "apply": {"prompt": "all", "generation": "none"}}
    same({"steering": {"vectors": [prompt]}}, "add(joy, 2 raw) at 1,3 on prompt+first", known)
    for change, why in (
        ({"apply": {"prompt": "none", "generation": "all"}}, "apply is"),
        ({"apply": None}, "needs apply"), ({"algorithm": "loreft"}, "only 'direct'"),
        ({"normalize": True}, "only 'direct'"), ({"layers": []}, "needs layers"),
        ({"source": "../joy"}, "unknown vector"), ({"scal": 1}, "unknown field 'scal'.*scale"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            carried({"steering": {"vectors": [{**vector, **change}]}}, known)


@pytest.mark.parametrize("line", [
    "add(joy, 5) at 3 on all+first",
    "clamp(joy, 2) at 1 on all+first; add(sad, 1) at 4 on all+first",
    "clamp_min(joy, 2) at 3 on all+first", "clamp_max(joy, -2) at 3 on all+first",
    "ablate(sad) at 3 on prompt+first",
])  # fmt: skip
def test_interp_engines_requests_are_what_we_export(tiny, known, line):
    same(json.loads(json.dumps(interp_engine(parse(line, known), tiny))), line, known)


def test_interp_engines_operations(known):
    joy = known["joy"].vector.tolist()
    raw = {"method": "additive", "vector": joy, "scale": 2.0}
    body = {"steering": [{"layers": {"3": [raw]}}]}
    same(body, "add(joy, 2 raw) at 3 on all+first", known)
    normal = {"steering": [{"point": "resid_post", "layers": {"3": [{**raw, "normalize": True}]}}]}
    same(normal, "add(joy, 2) at 3 on all+first", known)
    bits = known["joy"].vector.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    half = {"dtype": "bfloat16", "shape": [64], "data": base64.b64encode(bits).decode()}
    found = resolve(carried({"steering": [{"layers": {"3": [{**raw, "vector": half}]}}]}, known))
    assert found[0].directions[0].cosine(known["joy"]) > 0.9999
    for change, why in (
        ({"method": "swap", "target": joy}, "'swap' is not done here"),
        ({"method": "norm_scaled_add", "strength": 1}, "not done here"),
        ({"vector": [0.0] * 64}, "points nowhere"), ({"vector": "joy"}, "a vector is a list"),
        ({"vector": [1, "a"]}, "no number"), ({"vector": half | {"shape": [65]}}, "needs 130"),
        ({"vector": half | {"data": "!"}}, "no base64"), ({"scale": "a"}, "scale is 'a'"),
        ({"vector": half | {"shape": [10**9]}}, "expected at most"),
        ({"scale": float("nan")}, "scale is nan"), ({"extra": 1}, "unknown field 'extra'"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            carried({"steering": [{"layers": {"3": [{**raw, **change}]}}]}, known)
    for spec, why in (
        ({"point": "mlp_out", "layers": {"3": [raw]}}, "go to resid_post"),
        ({"layers": {"-3": [raw]}}, "layer is '-3'"), ({"layers": [raw]}, "needs layers"),
        ({"layers": {"3": [{"method": "projection_cap", "vector": joy}]}}, "needs min, max"),
        ({"layers": {"3": [{"method": "projection_cap", "vector": joy, "min": 0, "max": 2}]}},
         "between two bounds"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            carried({"steering": [spec]}, known)


def test_vllm_lenss_requests_are_what_we_export(tiny, known):
    line = "add(joy, 5) at 3 on all+first; add(sad, -2) at 1 on all+first"
    found = constants(parse(line, known), tiny)
    back = resolve(carried(vllm_lens(found), known))
    assert {one.sites[0] for one in back} == set(found)
    for one in back:
        vector = one.directions[0].unit * one.value
        assert torch.allclose(vector, found[one.sites[0]], atol=1e-4)


def test_vllm_lenss_own_bytes(known):
    """Packed by zstd, in bfloat16's bits; a frame that says more than its shape is refused."""
    zstandard = pytest.importorskip("zstandard")
    bits = known["joy"].vector.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    packed = base64.b64encode(zstandard.compress(bits)).decode()
    vector = {"activations": {"data": packed, "dtype": "int16", "shape": [1, 64],
                              "original_dtype": "torch.bfloat16", "compression": "zstd"},
              "layer_indices": [3], "scale": 2.0}  # fmt: skip
    found = resolve(
        carried({"vllm_xargs": {"apply_steering_vectors": json.dumps([vector])}}, known)
    )
    assert found[0].directions[0].cosine(known["joy"]) > 0.9999
    assert found[0].value == pytest.approx(2 * known["joy"].norm, rel=1e-2)
    bomb = base64.b64encode(zstandard.compress(bytes(10**8))).decode()
    for change, why in (
        ({"data": bomb}, "data has 129 bytes"), ({"data": "AAAA"}, "decompressed"),
        ({"compression": "gzip"}, "expected 'zstd'"), ({"shape": [64]}, "expected a row for each"),
    ):  # fmt: skip
        wrong = {**vector, "activations": {**vector["activations"], **change}}
        with pytest.raises(RequestError, match=why):
            carried({"vllm_xargs": {"apply_steering_vectors": json.dumps([wrong])}}, known)
    with pytest.raises(RequestError, match="norm_match"):
        asked = json.dumps([{**vector, "norm_match": True}])
        carried({"vllm_xargs": {"apply_steering_vectors": asked}}, known)


def test_two_carriers_are_refused(known):
    body = {"steering": "add(joy, 2) at 1", "vllm_xargs": {"hotwire": {"id": "joy", "layer": 1}}}
    with pytest.raises(RequestError, match="comes in steering and in hotwire"):
        carried(body, known)
    both = {"vllm_xargs": {"hotwire": "{}", "apply_steering_vectors": "[]"}}
    with pytest.raises(RequestError, match="hotwire and in apply_steering_vectors"):
        carried(both, known)
    for wrong, why in (({"vllm_xargs": 5}, "no object"), ({"steering": []}, "expected such"),
                       ({"steering": [5]}, "expected such"),
                       ({"vllm_xargs": {"hotwire": "{"}}, "no JSON")):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            carried(wrong, known)
