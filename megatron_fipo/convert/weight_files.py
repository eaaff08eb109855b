"""Which files of a Hugging Face folder hold its weights: those that transformers takes, and no others.

    model.safetensors                                  all tensors
    model.safetensors.index.json                       the file of each tensor

transformers takes the first where there is one, else the second, and nothing else; vLLM and SGLang follow the index
where there is one. So a folder with both is refused, unless they say the same. Any other *.safetensors file is left
over from something else: it is never read, and `WeightFiles.left_over` names it for a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_fipo.config.text_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached|cos_sin_cache)|masked_bias|position_ids|causal_mask)$"
    r"|\b(attn|attention)\.bias$|\._extra_state$"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor is no weight, but a buffer that early transformers stored beside the weights.

    They are frequencies and tables of RoPE, masks (`attn.bias` holds one; projections are called `q_proj.bias`) and
    positions. They follow from config.json, so nothing is lost without them.
    """
    return _BUFFER.search(name) is not None


@dataclass(frozen=True)
class WeightFiles:
    """A folder's files of weights.

    Attributes:
        files: the files that are read, sorted.
        owner_of: tensor -> file, as the index has it; None without an index, where the one file has them all.
        left_over: the names of other weight files, which are not read.
    """

    files: tuple[Path, ...]
    owner_of: dict[str, str] | None
    left_over: tuple[str, ...]

    def warning(self) -> str:
        """A warning about files that are not read; empty where there are none."""
        if not self.left_over:
            return ""
        source = INDEX_FILE if self.owner_of is not None else SINGLE_FILE
        return (
            f"{self.files[0].parent}: the weights are those of {source}; {first_of(self.left_over)} beside them "
            f"{'is' if len(self.left_over) == 1 else 'are'} not read. Delete what is left over, since a rollout engine "
            "may read it."
        )


def find_weight_files(folder: str | Path) -> WeightFiles:
    """The files that hold a folder's weights.

    Raises:
        ValueError: if there are none, the index is damaged or names something other than files of the folder, or
            the folder does not say which of several to read.
    """
    root = Path(folder)
    found = {path.name for path in root.glob("*.safetensors")}
    single, index = root / SINGLE_FILE, root / INDEX_FILE
    if index.is_file():
        owner_of = _read_index(index)
        files = set(owner_of.values())
        if SINGLE_FILE in found and files != {SINGLE_FILE}:
            raise ValueError(
                f"{root} holds {SINGLE_FILE} and {INDEX_FILE}, which names {first_of(sorted(files))}: transformers "
                "would take the one, rollout engines the other. Delete those that are not the model's."
            )
    elif single.is_file():
        owner_of, files = None, {SINGLE_FILE}
    elif not found:
        raise ValueError(f"{folder} holds no *.safetensors file; model.path needs weights in that format.")
    else:
        raise ValueError(
            f"{root} holds {first_of(sorted(found))}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which says which "
            "file has which tensor; transformers reads nothing else. Copy or download the index too, or, if one file "
            f"is the whole model, rename it to {SINGLE_FILE}."
        )
    return WeightFiles(tuple(root / name for name in sorted(files)), owner_of, tuple(sorted(found - files)))


def _read_index(file: Path) -> dict[str, str]:
    index = read_index_object(file)
    for name, owner in index.items():
        if not isinstance(owner, str) or Path(owner).name != owner or not owner.endswith(".safetensors"):
            raise ValueError(
                f"{file}: tensor {name} is assigned to {owner!r}, which is no *.safetensors file of this folder. "
                "Copy or download the index again."
            )
    if not index:
        raise ValueError(f"{file} names no tensor. Copy or download it again.")
    return index


def read_index_object(file: Path) -> dict[str, str]:
    """`weight_map` of an index.

    Raises:
        ValueError: if the file is no index.
    """
    try:
        raw = read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{file} is no index of weight files: {error}") from error
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(raw.get("metadata", {}), dict):
        raise ValueError(
            f"{file} is no index of weight files: it should hold the objects metadata and weight_map. Copy or "
            "download it again."
        )
    return weight_map


def tied_difference(embedding: Tensor, output: Tensor) -> str:
    """Describe how an output layer differs from the embedding that it is tied to; empty where it does not."""
    if embedding.shape != output.shape:
        return f"it is {list(output.shape)}, the embedding {list(embedding.shape)}"
    differ = embedding.to(output.dtype) != output
    if not differ.any():
        return ""
    first = differ.nonzero()[0].tolist()
    values = f"{float(output[tuple(first)])!r} instead of {float(embedding[tuple(first)])!r}"
    return f"{int(differ.sum())} of {output.numel()} elements differ, the first at {first}: {values}"


def first_of(names: Iterable[str], limit: int = 3) -> str:
    """The first of several names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "") or "none"
