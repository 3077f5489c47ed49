"""Weights of other programs: Hugging Face's GPT-2 files, read and written, and nanoGPT's checkpoints, read.

GPT-2 is read and written in Hugging Face's layout: `config.json` beside `model.safetensors`. It differs from our
state_dict:

| Hugging Face                            | here                                                         |
|-----------------------------------------|--------------------------------------------------------------|
| `h.0.…`, or `transformer.h.0.…`         | `transformer.h.0.…`                                          |
| c_attn, c_proj, c_fc weights (in, out)  | (out, in): OpenAI's "Conv1D" is a Linear, stored transposed  |
| `lm_head.weight`, absent if tied        | always tied to `transformer.wte.weight`                      |
| `attn.bias`, `attn.masked_bias`         | none: the causal mask, not a parameter                       |

`transformers` is not imported, because it expects another package named `kernels`. Models are built on the meta device
and then get the tensors. So the weights are in memory once, and nothing is initialised twice.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import REFERENCE, Ops
from kernels.reference import LAYER_NORM_EPS
from model.config import GPT2_SIZES, GPTConfig
from model.gpt import GPT

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MADE_BY = "nanofuse"  # in config.json: the folder is an export of ours
HUB = "openai-community"  # the account that holds OpenAI's four models
END_OF_TEXT = 50256  # the id of <|endoftext|> in GPT-2's vocabulary
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}  # Hugging Face's names -> ours
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # people halve their files
MAX_CONFIG = 1 << 20  # bytes of a config.json
MAX_SIZE = 1 << 24  # of a dimension
SHAPE = {  # our field -> config.json's
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def load_gpt2(
    source: str | os.PathLike[str],
    ops: Ops = REFERENCE,
    *,
    dropout: float = 0.0,
    gelu: str | None = None,
    **options: Any,
) -> GPT:
    """A GPT with the weights of `source`, float32 on the CPU.

    source: a `model.safetensors` file with its `config.json` beside it, the folder of both, or a name of GPT2_SIZES,
    which `huggingface_hub` downloads once and keeps. gelu: None takes config.json's. options: `GPT`'s precision,
    attention, recompute.

    Raises FileNotFoundError (no file, or no network), ImportError (a package is missing), ValueError (not the tensors
    of a GPT-2, or a config.json that our GPT does not support).
    """
    path, config, state = _read(source, dropout, gelu, weights=True)
    return _built(config, state, path, ops, options)


def gpt2_shape(source: str | os.PathLike[str], *, dropout: float = 0.0, gelu: str | None = None) -> GPTConfig:
    """The shape of the model that `load_gpt2` would load. It reads no weights."""
    return _read(source, dropout, gelu, weights=False)[1]


def _read(
    source: str | os.PathLike[str], dropout: float, gelu: str | None, *, weights: bool
) -> tuple[Path, GPTConfig, dict[str, Tensor]]:
    """(the safetensors file, the shape, if `weights` the tensors under our names)."""
    safetensors = _safetensors()
    path, config = _locate(source)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if not key.endswith(MASKS)]  # noqa: SIM118
            names = {key: key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}" for key in keys}
            shape = _read_config(config, dropout, gelu)
            _check_blocks(shape, names.values(), path)
            # copies: the tensors of the file are views of it, mapped
            how = {"memory_format": torch.contiguous_format}
            read = names.items() if weights else ()
            return path, shape, {name: _transposed(name, file.get_tensor(key)).clone(**how) for key, name in read}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def from_checkpoint(
    checkpoint: Mapping[str, Any], ops: Ops = REFERENCE, *, dropout: float | None = None, **options: Any
) -> GPT:
    """The GPT of a checkpoint from `train.checkpoint.load`, ours or nanoGPT's. It shares the memory of float32 weights;
    weights of other floating dtypes are converted.

    Reads `model_args`, `model` and, if present, `nanofuse["gelu"]`. dropout: None takes the checkpoint's. options: as
    for `load_gpt2`. Raises ValueError if shape and tensors do not agree, and for tensors that are no weights.
    """
    config = GPTConfig(**checkpoint["model_args"], gelu=checkpoint.get("nanofuse", {}).get("gelu", "erf"))
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    return _built(config, checkpoint["model"], "model", ops, options)


def export_gpt2(model: GPT, folder: str | os.PathLike[str]) -> None:
    """Write `model` into `folder` for `transformers`' GPT2LMHeadModel.from_pretrained.

    Weights are float32. Biases that the model lacks are written as zeros, because the layout always has them. A padded
    vocabulary keeps its size. `train.export` calls this on a temporary folder, so that no file is ever half written.
    """
    folder, config, save_file = Path(folder), model.config, _safetensors().torch.save_file
    tensors = {name: tensor.to("cpu", torch.float32) for name, tensor in model.state_dict().items() if name != HEAD}
    with torch.device("meta"):
        layout = GPT(dataclasses.replace(config, bias=True)).state_dict()
    for name, tensor in layout.items():
        if name != HEAD:
            ours = tensors[name] if name in tensors else torch.zeros(tensor.shape)
            tensors[name] = _transposed(name, ours).contiguous()
    end_of_text = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    description = {
        "made_by": MADE_BY,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _locate(source: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The safetensors file that `source` names, downloaded if necessary, and the config.json beside it."""
    path = Path(source)
    if os.path.isdir(path):
        path = path / WEIGHTS
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path.parent}: no {WEIGHTS} in this folder")
    if os.path.isfile(path):
        return path, path.with_name(CONFIG)
    name = str(source)
    if name not in GPT2_SIZES:
        raise FileNotFoundError(f"{name}: no such file or folder, and not one of {', '.join(GPT2_SIZES)}")
    instead = f"give the path of a {WEIGHTS} instead"
    try:
        from huggingface_hub import hf_hub_download

        path, config = (Path(hf_hub_download(f"{HUB}/{name}", file)) for file in (WEIGHTS, CONFIG))
    except ImportError:
        message = f"{name}: downloading needs huggingface_hub: pip install 'nanofuse[data]', or {instead}"
        raise ImportError(message) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: cannot download {HUB}/{name} ({reason}); {instead}") from error
    return path, config


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("reading and writing GPT-2 weights needs safetensors: pip install 'nanofuse[data]'") from None
    return safetensors


def _read_config(path: Path, dropout: float, gelu: str | None) -> GPTConfig:
    """The shape in a Hugging Face config.json. ValueError for a model that ours does not support."""
    if not os.path.lexists(path):
        raise ValueError(f"{path}: missing, expected it beside {WEIGHTS}: it tells the number of heads")
    try:
        if not os.path.isfile(path) or path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"no regular file of at most {MAX_CONFIG:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        shape = {ours: found[theirs] for ours, theirs in SHAPE.items()}
        for ours, size in shape.items():
            if type(size) is not int or not 1 <= size < MAX_SIZE:
                raise ValueError(f"{SHAPE[ours]}: got {str(size)[:40]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the config.json of a GPT-2 ({type(error).__name__}: {error})") from None
    only = {
        "model_type": ("gpt2",),
        "activation_function": tuple(GELUS),
        "layer_norm_epsilon": (LAYER_NORM_EPS,),
        "n_inner": (None, 4 * shape["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in only.items():
        if key in found and found[key] not in allowed:
            raise ValueError(f"{path}: {key}: got {found[key]!r:.80}, expected {' or '.join(map(repr, allowed))}")
    gelu = gelu or GELUS[found.get("activation_function", "gelu_new")]
    return GPTConfig(**shape, bias=True, gelu=gelu, dropout=dropout)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(CONV1D) else tensor


def _check_blocks(config: GPTConfig, names: Iterable[str], where: object) -> None:
    """ValueError unless there are tensors of n_layer blocks. To build a model of more could take forever."""
    blocks = len({name.split(".")[2] for name in names if name.startswith("transformer.h.")})
    if config.n_layer > blocks:
        raise ValueError(f"{where}: transformer.h.{blocks} is missing: n_layer is {config.n_layer}")


def _built(
    config: GPTConfig, tensors: Mapping[str, Tensor], where: object, ops: Ops, options: Mapping[str, Any]
) -> GPT:
    """A GPT that owns these tensors, under our names, in float32. The tied head may be absent. ValueError, with the
    first three differences, if they are not its weights."""
    _check_blocks(config, tensors, where)
    with torch.device("meta"):  # no memory, no initialisation, no random numbers
        model = GPT(config, ops, **options)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors and name != HEAD]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"{name} is unknown")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
        elif tensor.dtype not in FLOATS:
            wrong.append(f"{name} has {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            wrong.append(f"{name} has more elements than values")
    if not wrong and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        wrong.append(f"{HEAD} differs from {EMBEDDING}, expected a head tied to the embedding")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{where}: {'; '.join(wrong[:3])}{more}")
    state = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    model.load_state_dict({**state, HEAD: state[EMBEDDING]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # one parameter again, not two that share memory
    return model
