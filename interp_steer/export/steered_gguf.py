"""A GGUF model whose blocks add vectors themselves: `llama-server` needs no option for it.

llama.cpp's Llama adds `blk.L.ffn_down.bias` to the output of block L's MLP, and so to `resid_post`,
and `blk.L.attn_output.bias` to `attn_out`, where a file has them. Layer 0 works too, and the base
may be quantised: biases stay float32.
"""

from pathlib import Path
from typing import Any

import numpy as np

from interp_steer.errors import RequestError, RunError
from interp_steer.export.constant import Constants, refuse_others
from interp_steer.util.console import Report
from interp_steer.util.files import explained, whole

_TENSORS = {"resid_post": "ffn_down", "attn_out": "attn_output"}


def check(found: Constants, base: Path, out: Path) -> None:
    """Refuses sites that no bias reaches, and a base that is no GGUF file or is to be replaced."""
    refuse_others(found, tuple(_TENSORS), "a GGUF bias")
    if out.exists() and base.exists() and out.samefile(base):
        raise RequestError(f"{out} is the base itself; give another file")
    with explained(base), base.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RequestError(f"{base} is not a GGUF file")


def write(found: Constants, base: Path, out: Path, *, report: Report | None = None) -> Path:
    """Writes the base's fields and tensors, and one bias for every site.

    Args:
        report: called with the bytes of tensors written so far.

    Raises:
        RequestError: a site that no bias reaches; a base that is no Llama of this shape, or has
            such a bias already.
        RunError: the base cannot be read, or the disk is full.
    """
    import gguf

    check(found, base, out)
    try:
        reader = gguf.GGUFReader(base)
        architecture = _value(reader, "general.architecture")
        layers = _value(reader, f"{architecture}.block_count")
        width = _value(reader, f"{architecture}.embedding_length")
    except Exception as error:  # gguf's reader believes what it reads
        raise RunError(f"{base} is damaged: {str(error)[:200]}") from error
    if architecture != "llama":
        raise RequestError(f"{base} is a {architecture!r} model; expected 'llama'")
    names = {tensor.name for tensor in reader.tensors}
    added: dict[str, Any] = {}
    for site, vector in found.items():
        key = f"blk.{site.layer}.{_TENSORS[site.component]}.bias"
        if site.layer >= layers or len(vector) != width:
            raise RequestError(
                f"{site} of {len(vector)} numbers does not fit {base.name}: it has {layers} layers "
                f"of width {width}"
            )
        if key in names:
            raise RequestError(f"{base.name} has {key} already; give the model as it was")
        added[key] = vector.numpy().astype(np.float32)
    with whole(out) as part:
        writer = gguf.GGUFWriter(part, architecture)
        for field in reader.fields.values():
            if field.name == "general.architecture" or field.name.startswith("GGUF."):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        alignment = reader.get_field("general.alignment")
        if alignment:
            writer.data_alignment = alignment.contents()
        tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors]
        tensors += [(key, data, gguf.GGMLQuantizationType.F32) for key, data in added.items()]
        for name, data, quantisation in tensors:
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, quantisation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for _, data, _ in tensors:
            writer.write_tensor_data(data)
            done += data.nbytes
            if report:
                report(done)
        writer.close()
    return out


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"it has no {key}")
    return field.contents()
