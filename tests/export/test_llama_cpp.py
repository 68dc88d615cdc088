"""Both GGUF forms in llama.cpp itself: the wheel `xllamacpp`, through its C interface.

Skipped without the wheel (extra `peers`).
"""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.export import control_vector, steered_gguf
from interp_steer.export.constant import constants
from interp_steer.model.model import SteeringModel
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import make_llama

PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip

LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
CLOSE = 5e-3  # rms of logits of about 2: llama.cpp keeps keys and values in half precision


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SteeringModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    folder = make_llama(
        tmp_path_factory.mktemp("plain"), rope_parameters=rope, head_dim=16, hidden_size=64
    )
    return SteeringModel.load(folder, device="cpu", dtype="float32")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key matrix in llama.cpp's order: rotated pairs beside each other."""
    parted = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return parted.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    """The model as GGUF, in float32 and without a vocabulary."""
    path, shape = tmp_path_factory.mktemp("gguf") / "base.gguf", model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_mlp)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.d_head)
    writer.add_value_length(shape.d_head)
    writer.add_rope_dimension_count(shape.d_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.d_vocab)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in model.hf.state_dict().items():
        weight, name = tensor.numpy(), key.removesuffix(".weight")
        if name in ("model.embed_tokens", "model.norm", "lm_head"):
            short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            writer.add_tensor(f"{short.get(name, 'output')}.weight", weight)
            continue
        _, _, layer, part = name.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):
            heads = shape.n_heads if part.endswith("q_proj") else shape.n_kv_heads
            weight = interleaved(weight, heads)
        writer.add_tensor(f"blk.{layer}.{PARTS[part]}.weight", np.ascontiguousarray(weight))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


class Settings(ctypes.Structure):
    """llama.cpp's settings, which are only handed through: more bytes than they have."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )  # fmt: skip


class Named(ctypes.Structure):
    """common_control_vector_load_info: a strength and a file's name. The wheel's std::string is the
    old one of libstdc++, a pointer to its characters.
    """

    _fields_ = (("strength", ctypes.c_float), ("name", ctypes.c_char_p))


class Vectors(ctypes.Structure):
    """common_control_vector_data: a width, and a std::vector of floats."""

    _fields_ = (("n_embd", ctypes.c_int), ("begin", ctypes.c_void_p), ("end", ctypes.c_void_p),
                ("room", ctypes.c_void_p))  # fmt: skip


class Span(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p))


def logits_of_llama_cpp(path: Path, ids, vector: Path | None = None, strength: float = 1.0):
    """Logits after the last token, by llama.cpp, which reads the control vector's file itself."""
    package = pytest.importorskip("xllamacpp")
    (shared,) = Path(package.__file__).parent.glob("xllamacpp*.so")
    llama = ctypes.CDLL(str(shared))
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    for kind in ("model", "context"):
        getattr(llama, f"llama_{kind}_default_params").restype = Settings
    load = llama.llama_model_load_from_file
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Settings]
    model = load(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    begin = llama.llama_init_from_model
    begin.restype, begin.argtypes = ctypes.c_void_p, [ctypes.c_void_p, Settings]
    context = begin(model, llama.llama_context_default_params())
    if vector:
        read = llama[LOADER]
        asked = Named(strength, str(vector).encode())
        start = ctypes.addressof(asked)
        span = Span(start, start + ctypes.sizeof(asked), start + ctypes.sizeof(asked))
        read.restype, read.argtypes = Vectors, [ctypes.c_void_p]
        found = read(ctypes.addressof(span))
        assert found.n_embd > 0, f"llama.cpp does not read {vector}"
        count = (found.end - found.begin) // 4
        use = llama.llama_set_adapter_cvec
        use.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int32] * 3]
        layers = count // found.n_embd
        assert use(context, found.begin, count, found.n_embd, 1, layers) == 0
    tokens = (ctypes.c_int32 * len(ids))(*ids)
    one = llama.llama_batch_get_one
    one.restype, one.argtypes = Batch, [ctypes.c_void_p, ctypes.c_int32]
    decode = llama.llama_decode
    decode.argtypes = [ctypes.c_void_p, Batch]
    assert decode(context, one(ctypes.addressof(tokens), len(ids))) == 0
    last = llama.llama_get_logits_ith
    last.restype, last.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]
    size = llama.llama_vocab_n_tokens
    size.argtypes, llama.llama_model_get_vocab.restype = [ctypes.c_void_p], ctypes.c_void_p
    llama.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    count = size(llama.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(last(context, -1), (count,)).copy()
    for free, what in (("llama_free", context), ("llama_model_free", model)):
        getattr(llama, free).argtypes = [ctypes.c_void_p]
        getattr(llama, free)(what)
    return torch.from_numpy(logits)


@pytest.fixture(scope="module")
def ids(model):
    return model.encode("The quick brown fox jumps over the tower").ids


def by_hook(model, ids, layer, vector):
    """Logits after the last token with a plain hook in transformers."""

    def change(_module, _inputs, out):
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handle = model.hf.model.layers[layer].register_forward_hook(change)
    with torch.no_grad():
        found = model.hf(torch.tensor([ids])).logits[0, -1]
    handle.remove()
    return found


def rms(one, other):
    return (one - other).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("layer", [0, 1, 3, 5])
def test_both_forms_steer_the_block_that_they_name(model, base, ids, tmp_path, layer):
    """Equal to a hook at the block, and not at its neighbours: an off-by-one would show."""
    numbers = np.random.default_rng(layer).normal(size=64)
    direction = Direction.of(numbers, "blocks.0.hook_resid_post")
    known = {"one": direction}
    found = constants(parse(f"add(one, 6) at {layer} on all+first", known), model)
    vector = direction.unit * 6
    here = by_hook(model, ids, layer, vector)
    with torch.no_grad():
        plain = model.hf(torch.tensor([ids])).logits[0, -1]
    assert rms(logits_of_llama_cpp(base, ids), plain) < CLOSE
    neighbours = [by_hook(model, ids, n, vector) for n in (layer - 1, layer + 1) if 0 <= n < 6]
    forms = [logits_of_llama_cpp(steered_gguf.write(found, base, tmp_path / "steered.gguf"), ids)]
    if layer:
        file = control_vector.write(found, tmp_path / "v.gguf")
        forms.append(logits_of_llama_cpp(base, ids, file))
        half = logits_of_llama_cpp(base, ids, file, 0.5)
        assert rms(half, by_hook(model, ids, layer, vector / 2)) < CLOSE
    for got in forms:
        assert rms(got, here) < CLOSE
        assert rms(got, plain) > 20 * CLOSE
        assert all(rms(got, other) > 20 * CLOSE for other in neighbours)


@pytest.mark.parametrize("layer", [1, 4])
def test_a_quantised_base_is_steered_at_the_same_block(model, base, ids, tmp_path, layer):
    """Quantised to 8 bits by `gguf`: biases as llama.cpp's own control vector, on the same base."""
    reader, quantised = gguf.GGUFReader(base), tmp_path / "q8.gguf"
    writer = gguf.GGUFWriter(quantised, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        data = tensor.data
        if data.ndim == 1:
            writer.add_tensor(tensor.name, data)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(data, kind), raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    known = {
        "one": Direction.of(np.random.default_rng(7).normal(size=64), "blocks.0.hook_resid_post")
    }
    found, above = (
        constants(parse(f"add(one, 6) at {place} on all+first", known), model)
        for place in (layer, layer + 1)
    )
    got = logits_of_llama_cpp(steered_gguf.write(found, quantised, tmp_path / "s.gguf"), ids)
    vector = control_vector.write(found, tmp_path / "v.gguf")
    neighbour = control_vector.write(above, tmp_path / "n.gguf")
    assert rms(got, logits_of_llama_cpp(quantised, ids, vector)) < CLOSE
    assert rms(got, logits_of_llama_cpp(quantised, ids)) > 20 * CLOSE
    assert rms(got, logits_of_llama_cpp(quantised, ids, neighbour)) > 20 * CLOSE


@pytest.mark.slow
def test_the_starters_own_file_steers_in_llama_cpps_server(tmp_path):
    """4 bits, a vocabulary and a template, as people have them; asked over HTTP."""
    xllamacpp = pytest.importorskip("xllamacpp")
    import requests

    from interp_steer.features.feature import feature
    from interp_steer.model import starter
    from interp_steer.prompts.file import QUESTIONS, read_items

    base, steered = starter._fetch(tmp_path), tmp_path / "steered.gguf"
    lines = parse("add(paris, 40) at 13 on all+first", {"paris": feature("starter", 2652)})
    steered_gguf.write(constants(lines, SteeringModel.load("starter")), base, steered)
    counts = []
    for path in (base, steered):
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.port = str(path), 512, 0
        settings.verbosity, settings.warmup = 0, False
        server = xllamacpp.Server(settings)
        texts = []
        for item in read_items(QUESTIONS)[:8]:
            body = {"messages": [{"role": "user", "content": item.prompt}], "max_tokens": 40}
            body |= {"temperature": 0}
            answer = requests.post(f"{server.listening_address}/v1/chat/completions", json=body)
            texts.append(answer.json()["choices"][0]["message"]["content"])
        counts.append(sum("Paris" in text or "France" in text for text in texts))
        del server
    assert counts[0] == 0 and counts[1] >= 1, counts


def test_a_steered_gguf_has_one_tensor_more(model, base, ids, tmp_path):
    known = {"one": Direction.of(np.ones(64), "blocks.2.hook_resid_post")}
    lines = "add(one, 2) at 2 on all+first; add(one, 1) at attn_out 4 on all+first"
    found = constants(parse(lines, known), model)
    out = steered_gguf.write(found, base, tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(base), gguf.GGUFReader(out)
    kept = {t.name: t for t in after.tensors}
    added = set(kept) - {t.name for t in before.tensors}
    assert added == {"blk.2.ffn_down.bias", "blk.4.attn_output.bias"}
    assert all(np.array_equal(t.data, kept[t.name].data) for t in before.tensors)
    skipped = ("GGUF.", "general.architecture")
    fields = {k: f.contents() for k, f in before.fields.items() if not k.startswith(skipped)}
    assert fields and fields == {k: after.get_field(k).contents() for k in fields}
    with pytest.raises(RequestError, match=r"has blk\.4\.attn_output\.bias already"):
        steered_gguf.write(found, out, tmp_path / "twice.gguf")
    with pytest.raises(RequestError, match="is the base itself"):
        steered_gguf.write(found, base, base)
    wide = {"one": Direction.of(np.ones(32), "blocks.2.hook_resid_post")}
    from interp_steer.model.shape import Bounds

    other = constants(parse("add(one, 2) at 2 on all+first", wide), Bounds("x", 6, 4, 32, 8))
    with pytest.raises(RequestError, match="6 layers of width 64"):
        steered_gguf.write(other, base, tmp_path / "narrow.gguf")
    (tmp_path / "torn.gguf").write_bytes(base.read_bytes()[:500])
    with pytest.raises(Exception, match="damaged"):
        steered_gguf.write(found, tmp_path / "torn.gguf", tmp_path / "o.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "torn.gguf"]
