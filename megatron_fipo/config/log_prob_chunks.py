"""How many tokens go through the output layer together."""

from __future__ import annotations

_TILES = (128, 16)
"""Rows that matrix products on a GPU take at a time; a part of one costs as much as the whole."""


def log_prob_chunk_tokens(chunk_mib: float, rows: int) -> int:
    """Tokens whose float32 logits fit into `chunk_mib`: a multiple of 128, or of 16, where that is not 0; at least 1.

    Args:
        chunk_mib: model.log_prob_chunk_mib.
        rows: of the output layer on one tensor-parallel rank, padding included, so that all ranks agree.
    """
    fitting = int(chunk_mib * 2**20 / (4 * rows))
    return next((fitting // tile * tile for tile in _TILES if fitting >= tile), max(fitting, 1))
