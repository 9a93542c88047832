"""Load a model as people have it: a folder, a hub id, a GGUF file, or the embedded model."""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hillinfer import gguf_file
from hillinfer.assets import cpu_info, data_folder
from hillinfer.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to load
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # flags of CPUs with instructions for products of bfloat16


def model_path(name: str) -> str:
    """The folder of `embedded`, a local folder or a GGUF file as an absolute path; a name on the hub unchanged."""
    path = data_folder("model") if name == "embedded" else Path(name)
    return str(path.resolve()) if path.exists() else name


def load_model(name: str, dtype: "torch.dtype | str" = "auto") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model, on the GPU if there is one, and its tokenizer.

    name   embedded, a folder, a hub id, a GGUF file, or a GGUF file of the hub as `hub-id:file.gguf`
    dtype  of the weights, such as float32; `auto` as in `choose_dtype`

    Weights in GGUF blocks are unpacked into dense ones: transformers computes with blocks for three families only, on a
    GPU, with a kernel that it downloads. Raises UsageError as `load_pretrained`.
    """
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = (load_pretrained(kind, name) for kind in (AutoConfig, AutoTokenizer))
    return load_weights(name, config, choose_dtype(name, config, dtype)), tokenizer


def load_weights(name: str, config: "PretrainedConfig", dtype: "torch.dtype", tell=None) -> "PreTrainedModel":
    """The model `name`, whose config has been loaded, ready to generate. UsageError if its file lacks weights.

    tell  as in `load_pretrained`
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = dict(config=config, dtype=dtype, output_loading_info=True)
    model, info = load_pretrained(AutoModelForCausalLM, name, tell, **options)
    if lacking := sorted(info["missing_keys"]):
        raise UsageError(
            f"model '{name}' lacks {len(lacking)} weights, such as {lacking[0]}: download it again, or give another"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_pretrained(loader, name: str, tell: Callable[[str, float], None] | None = None, **options):
    """`loader.from_pretrained` for any `name` that `load_model` takes. Never runs a model's own code.

    loader   a class of transformers: AutoConfig, AutoTokenizer, AutoModelForCausalLM
    tell     is given what is done with a GGUF file's tensors, and the share of it, 0 to 1
    options  keyword arguments of `from_pretrained`

    Raises UsageError if the files are missing, unreachable, damaged or not of a known architecture.
    """
    path = Path(model_path(name))
    local = path.exists()
    online, opened = not local and hub_reachable(), nullcontext()
    expected, fix = (OSError, ValueError, KeyError), "give a folder with config.json, a hub id, or hub-id:file.gguf"
    try:
        if not local and path.suffix == ".gguf":
            path = _download(str(name), online)
        if path.is_file():
            opened = gguf_file.read_fast(len(gguf_file.check(path).tensors), tell)
            # On an unknown or damaged file transformers raises whatever comes.
            expected, fix = Exception, "give the .gguf file of a text model that transformers knows, or its folder"
            options |= {"gguf_file": path.name} | _unpack(loader)
            path = path.parent
        elif not (path / "config.json").exists() and (files := sorted(file.name for file in path.glob("*.gguf"))):
            raise UsageError(f"{name} has no config.json; name one of its files: {', '.join(files)}")
        with opened:
            return loader.from_pretrained(str(path), trust_remote_code=False, local_files_only=not online, **options)
    except UsageError:
        raise
    except expected as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        reason = reason if local or online else "no network, and not in the hub's cache"
        raise UsageError(f"cannot load model '{name}' ({reason}); {fix}") from None


def _download(name: str, online: bool) -> Path:
    """The local path of `hub-id:file.gguf`."""
    from huggingface_hub import hf_hub_download

    repository, colon, file = name.partition(":")
    if not colon:
        raise UsageError(f"there is no file {name}; give another path, or hub-id:file.gguf")
    return Path(hf_hub_download(repository, file, local_files_only=not online))


def _unpack(loader) -> dict:
    """Options of `from_pretrained` for dense weights; releases without `GgufConfig` unpack them anyway."""
    import transformers

    dense = loader is transformers.AutoModelForCausalLM and hasattr(transformers, "GgufConfig")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if dense else {}


def hub_reachable(wait_s: float = 3.0) -> bool:
    """True if a download can succeed. Without this check, an unreachable Hub is retried for 23 s (measured)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), wait_s).close()
        return True
    except OSError:
        return False


def choose_dtype(name: str, config: "PretrainedConfig", dtype: "torch.dtype | str" = "auto") -> "torch.dtype":
    """The dtype to load weights in. `auto` takes what this machine computes fast.

    On a GPU the config's own. On a CPU bfloat16, if it has instructions for that and the weights were saved so or are a
    GGUF file's; otherwise float32. The embedded model is always float32, as in its published evaluation.
    """
    import torch

    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if model_path(name) == model_path("embedded"):
        return torch.float32
    if torch.cuda.is_available():
        return config.dtype or torch.float32
    fits = config.dtype == torch.bfloat16 or Path(name).suffix == ".gguf"
    fast = FAST_BFLOAT16 & set(" ".join(cpu_info("flags")[:1]).split())
    return torch.bfloat16 if fits and fast else torch.float32
