import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interp_steer.errors import RequestError, RunError
from interp_steer.features import decoder
from interp_steer.features.feature import feature, locate
from interp_steer.labels import registry
from tests.features.test_feature import (
    ANDY,
    COMMIT,
    D_IN,
    D_SAE,
    GOODFIRE,
    OLD,
    SCOPE,
    TEMPORAL,
    assert_exact,
    put_andy,
    put_old,
    put_scope,
    random,
    saved,
    stored,
)

pytestmark = pytest.mark.usefixtures("cache")


def put_goodfire(monkeypatch: pytest.MonkeyPatch, dtype=torch.float32) -> Path:
    """SAELens hard-codes 65536 features here: its settings alone are made small."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    real = loaders.get_goodfire_config_from_hf
    small = {"d_in": D_IN, "d_sae": D_SAE}
    monkeypatch.setattr(
        loaders, "get_goodfire_config_from_hf", lambda *a, **k: {**real(*a, **k), **small}
    )
    state = {
        "encoder_linear.weight": random(D_SAE, D_IN, seed=1),
        "encoder_linear.bias": random(D_SAE, seed=2),
        "decoder_linear.weight": random(D_IN, D_SAE, seed=3),
        "decoder_linear.bias": random(D_IN, seed=4),
    }
    torch.save({key: value.to(dtype) for key, value in state.items()}, stored(GOODFIRE))
    return stored(GOODFIRE)


def put_temporal(dtype=torch.float32) -> Path:
    import sae_lens.saes.temporal_sae as made

    sae = made.TemporalSAE(
        made.TemporalSAEConfig(d_in=D_IN, d_sae=D_SAE, n_heads=1, bottleneck_factor=2, kval_topk=4)
    )
    state = {key: value.to(dtype).contiguous() for key, value in sae.state_dict().items()}
    state |= {"D": state.pop("W_dec"), "b": state.pop("b_dec")}
    stored(TEMPORAL, "conf.yaml").write_text(
        textwrap.dedent(f"""
        llm: {{dimin: {D_IN}}}
        sae: {{exp_factor: 2.0, n_heads: 1, n_attn_layers: 1, bottleneck_factor: 2, kval_topk: 4,
              sae_diff_type: topk, tied_weights: true, scaling_factor: 0.029}}
        data: {{dtype: float32}}
    """)
    )
    save_file(state, stored(TEMPORAL, "latest_ckpt.safetensors"))
    return stored(TEMPORAL, "latest_ckpt.safetensors")


@pytest.mark.parametrize(
    ("names", "put", "hook"),
    [
        (SCOPE, lambda patch: put_scope(), "blocks.15.hook_resid_post"),
        (SCOPE, lambda patch: put_scope(dtype=torch.float32), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(torch.bfloat16), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(transposed=True), "blocks.15.hook_resid_post"),
        (ANDY, lambda patch: put_andy(old=True), "blocks.15.hook_resid_post"),
        (GOODFIRE, put_goodfire, "blocks.19.hook_resid_post"),
        (GOODFIRE, lambda patch: put_goodfire(patch, torch.float16), "blocks.19.hook_resid_post"),
        (TEMPORAL, lambda patch: put_temporal(), "blocks.15.hook_resid_post"),
        (OLD, lambda patch: put_old(), "blocks.8.hook_resid_pre"),
        (OLD, lambda patch: put_old(torch.float16), "blocks.8.hook_resid_pre"),
        (OLD, lambda patch: put_old(torch.bfloat16, normalize_activations=False),
         "blocks.8.hook_resid_pre"),
    ],
)  # fmt: skip
def test_rows_are_those_of_saelens_to_the_bit(names, put, hook, monkeypatch):
    from sae_lens import SAE

    put(monkeypatch)
    sae = SAE.from_pretrained(*names, device="cpu")
    # it divides temporal SAEs' reconstructions as it decodes, and leaves the rows as they are
    factor = sae.cfg.activation_normalization_factor if names == TEMPORAL else None
    for index in (0, 5, D_SAE - 1):
        want = sae.W_dec.detach()[index]
        want = want if factor is None else want / factor
        row = locate(*names).row(index)
        assert row.vector.dtype == torch.float32
        assert row.architecture == sae.cfg.architecture()
        assert (row.vector - want).abs().max().item() == 0.0
        got = feature(*names, index)
        assert_exact(got, want)
        assert got.hook_point == hook
        assert (got.source["revision"], got.source["repo"]) == (COMMIT, registry.entry(*names).repo)


def test_the_scale_of_activations_is_folded_in():
    put_scope(dtype=torch.float32)
    got = feature(*SCOPE, 3)
    raw = random(D_IN, D_SAE, seed=3)[:, 3]
    assert got.norm == pytest.approx(raw.norm().item() / 5.91907514450867, rel=1e-6)
    assert got.source["norm_scaling_factor"] == "5.91907514450867"


def test_a_unit_of_a_temporal_feature_is_what_its_sae_adds():
    from sae_lens import SAE

    put_temporal()
    sae = SAE.from_pretrained(*TEMPORAL, device="cpu")
    one = torch.zeros(2, D_SAE)
    one[1, 4] = 1
    off, on = sae.decode(one)
    assert torch.allclose(on - off, feature(*TEMPORAL, 4).vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "hook", "more", "said"),
    [
        ("standard", "blocks.5.attn.hook_z", {"reshape_activations": "hook_z"}, "hook_z"),
        ("standard", "blocks.5.ln2.hook_normalized", {}, "ln2.hook_normalized"),
        ("standard", "blocks.5.hook_resid_mid", {}, "hook_resid_mid"),
        ("standard", "", {}, "an unnamed place"),
        ("transcoder", "blocks.5.hook_mlp_in", {"d_out": D_IN}, "transcoder"),
        ("standard", "blocks.5.hook_resid_post", {"normalize_activations": "covariance_whitening"},
         "whitened activations"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_steered_are_refused(kind, hook, more, said, tmp_path):
    folder = saved(tmp_path / "mine", kind, hook, **more)
    with pytest.raises(RequestError, match=said) as error:
        feature(folder, 1)
    assert "\n" not in str(error.value)
    if said.startswith("hook"):
        assert "what can: resid_pre, resid_post, attn_out, mlp_out, z" in str(error.value)


def test_one_heads_sae_and_a_transcoder_find_their_place(tmp_path):
    z = saved(tmp_path / "z", "standard", "blocks.5.attn.hook_z", metadata={"hook_head_index": 3})
    assert feature(z, 1).hook_point == "blocks.5.attn.hook_z.3"
    across = saved(tmp_path / "across", "transcoder", "blocks.5.ln2.hook_normalized",
                   d_out=D_IN, metadata={"hook_name_out": "blocks.5.hook_mlp_out"})  # fmt: skip
    assert feature(across, 1).hook_point == "blocks.5.hook_mlp_out"


def test_llama_scope_transcoders_are_refused():
    put_scope(hook_point_out="blocks.15.hook_mlp_out")
    with pytest.raises(RequestError, match="a transcoder from"):
        feature(*SCOPE, 1)


@pytest.mark.parametrize(
    ("names", "put"),
    [
        (SCOPE, lambda patch: put_scope()),
        (ANDY, lambda patch: put_andy()),
        (ANDY, lambda patch: put_andy(old=True)),
        (GOODFIRE, put_goodfire),
        (TEMPORAL, lambda patch: put_temporal()),
        (OLD, lambda patch: put_old()),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_one_line(names, put, damage, monkeypatch):
    file = put(monkeypatch)
    data = file.read_bytes()
    left = {"cut": data[: len(data) // 4], "noise": b"\xff" * 999, "empty": b""}[damage]
    file.write_bytes(left)
    with pytest.raises(RunError, match="is damaged") as error:
        feature(*names, D_SAE - 1)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def header(**tensors) -> bytes:
    data = json.dumps(tensors).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "its header is said to be 1152921504606846976"),
        (struct.pack("<Q", 1 << 20) + b"{}", "its header is said to be 1048576"),
        (struct.pack("<Q", 4) + b"null", "not JSON"),
        (struct.pack("<Q", 4) + b"nope", "not JSON"),
        (header(), "it has no W_dec"),
        (header(W_dec={"dtype": "F32"}), "nothing sensible of W_dec"),
        (header(W_dec={"dtype": "I8", "shape": [2, 2], "data_offsets": [0, 4]}), "nothing sens"),
        (header(W_dec={"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}), "contradicts"),
        (header(W_dec={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}) + b"0" * 16,
         "expected a matrix"),
        (header(W_dec={"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}), "contradict"),
        (header(W_dec={"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}), "speaks of"),
    ],
)  # fmt: skip
def test_headers_are_not_believed(content, said, tmp_path):
    folder = saved(tmp_path / "mine")
    (folder / "sae_weights.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=rf"is damaged .*{said}") as error:
        feature(folder, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "put", "file"),
    [
        (SCOPE, put_scope, "hyperparams.json"),
        (ANDY, put_andy, "config.json"),
        (TEMPORAL, put_temporal, "conf.yaml"),
        (OLD, put_old, "cfg.json"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_settings_are_one_line(names, put, file, text):
    put()
    stored(names, file).write_text(text)
    with pytest.raises(RunError, match="is damaged") as error:
        feature(*names, 1)
    assert "\n" not in str(error.value)


def big(folder: Path, rows: int, columns: int, key: str = "W_dec", name: str = "F32") -> int:
    """A safetensors file of zeros that takes no disk; where its matrix starts."""
    size = rows * columns * (4 if name == "F32" else 2)
    about = {key: {"dtype": name, "shape": [rows, columns], "data_offsets": [0, size]}}
    head = header(**about)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return len(head)


def test_a_row_of_500_mb_takes_little_memory(tmp_path):
    row_file, column_file = tmp_path / "row.safetensors", tmp_path / "column.safetensors"
    start = big(row_file, 32768, 4096)
    with row_file.open("r+b") as file:
        file.seek(start + 30_000 * 4096 * 4)
        file.write(struct.pack("<f", 2.5))
    start = big(column_file, 4096, 65536, "decoder.weight", "BF16")
    with column_file.open("r+b") as file:
        file.seek(start + (4095 * 65536 + 30_000) * 2)
        file.write(b"\x20\x40")  # 2.5
    code = f"""
        import sys
        from pathlib import Path
        from interp_steer.features.decoder import Safetensors
        from interp_steer.features.hub import LocalFile
        def memory(entry):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
        for name, key, kind, at in (
            ({str(row_file)!r}, "W_dec", "row", 0),
            ({str(column_file)!r}, "decoder.weight", "column", 4095),
        ):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = memory("VmRSS")
            got = getattr(Safetensors(LocalFile(Path(name))), kind)(key, 30_000)
            assert got[at] == 2.5 and len(got) == 4096
            print(memory("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 2 and max(grown) < 64, grown


def test_units_of_every_layout_are_read_here():
    assert set(decoder.LAYOUTS) >= {"sae_lens", "llama_scope", "dictionary_learning_1"}
    loaders = {registry.entry(*names).loader for names in (SCOPE, ANDY, GOODFIRE, TEMPORAL, OLD)}
    assert loaders == set(decoder.LAYOUTS)
