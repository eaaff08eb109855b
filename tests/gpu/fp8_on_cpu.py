"""What FP8 costs, computed on the CPU: the layers' products with operands rounded to eight bits, by their definitions.

Source: Transformer Engine's documentation of Float8CurrentScaling (one scale for a tensor) and Float8BlockScaling (one
for 128 channels of a token's input, and one for 128 x 128 of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128


def _largest_of_all(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def _largest_of_rows_blocks(tensor: Tensor) -> Tensor:
    """Of each 128 channels of a row, for each of them."""
    rows, channels = tensor.shape
    blocks = F.pad(tensor, (0, -channels % BLOCK)).abs().unflatten(1, (-1, BLOCK))
    return blocks.amax(-1, keepdim=True).expand_as(blocks).reshape(rows, -1)[:, :channels]


def _largest_of_square_blocks(tensor: Tensor) -> Tensor:
    """Of each 128 x 128 numbers, for each of them."""
    rows, channels = tensor.shape
    padded = F.pad(tensor, (0, -channels % BLOCK, 0, -rows % BLOCK)).abs()
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return blocks.amax((1, 3), keepdim=True).expand_as(blocks).reshape(padded.shape)[:rows, :channels]


LARGEST: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tensorwise": (_largest_of_all, _largest_of_all),
    "blockwise": (_largest_of_rows_blocks, _largest_of_square_blocks),
}
"""By recipe: the number that is scaled to the format's largest, of inputs and of weights."""


def rounded(tensor: Tensor, largest: Tensor, number_format: torch.dtype) -> Tensor:
    """The nearest numbers of the format, after scaling; in the tensor's own type."""
    scale = torch.finfo(number_format).max / largest.float().clamp_min(1e-12)
    return ((tensor.float() * scale).to(number_format).float() / scale).to(tensor.dtype)


@contextmanager
def products_in_fp8(recipe: str, vocab_size: int, number_format: torch.dtype = torch.float8_e4m3fn) -> Iterator[None]:
    """Linear layers take rounded operands inside, except the output layer, known by its vocab_size rows."""
    largest_input, largest_weight = LARGEST[recipe]
    original = nn.Linear.forward

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        if self.out_features == vocab_size:
            return original(self, inputs)
        rows = inputs.flatten(0, -2)
        rows = rounded(rows, largest_input(rows), number_format)
        weight = rounded(self.weight, largest_weight(self.weight), number_format)
        return F.linear(rows, weight, self.bias).view(*inputs.shape[:-1], -1)

    with mock.patch.object(nn.Linear, "forward", forward):
        yield
