"""Who attaches to which running server, and what is said where none is. Attaching to real ones is in the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.rollout.servers.process import free_port
from tests.engines.attaching import expect_no_server, shares
from tests.models import save_random_model
from tests.parallel.ranks import run_ranks

THREE_NODES, TWO_NODES_OF_TWO = (0, 0, 0), (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("local_ranks", "num_urls", "expected"),
    [
        # Fewer than nodes: the others take no prompts, and those that have a server take all.
        (THREE_NODES, 1, [((0, 1), ["host:1"]), (None, []), (None, [])]),
        (THREE_NODES, 2, [((0, 2), ["host:1"]), ((1, 2), ["host:2"]), (None, [])]),
        (TWO_NODES_OF_TWO, 1, [((0, 1), ["host:1"]), (None, []), (None, []), (None, [])]),
        # One for each node's first rank, and more.
        (TWO_NODES_OF_TWO, 2, [((0, 2), ["host:1"]), (None, []), ((1, 2), ["host:2"]), (None, [])]),
        (TWO_NODES_OF_TWO, 3, [((0, 2), ["host:1", "host:3"]), (None, []), ((1, 2), ["host:2"]), (None, [])]),
    ],
)
def test_urls_are_dealt_out_to_nodes(
    tmp_path: Path, local_ranks: tuple[int, ...], num_urls: int, expected: list[object]
) -> None:
    model = save_random_model(tmp_path / "model", max_position_embeddings=4096)
    found = run_ranks(shares, len(local_ranks), "sglang", model, tmp_path, local_ranks, num_urls)
    assert found == expected


def test_an_url_where_nothing_listens_stops_every_rank(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", max_position_embeddings=4096)
    run_ranks(expect_no_server, 2, model, tmp_path, f"http://127.0.0.1:{free_port()}")
