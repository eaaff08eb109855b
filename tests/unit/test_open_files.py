"""The limit of open files grows with the number of ranks, and a system that forbids it is named."""

from __future__ import annotations

import resource
from unittest import mock

import pytest

from megatron_fipo.system.open_files import make_room_for


@pytest.mark.parametrize(
    ("limits", "num_ranks", "raised"),
    [
        ((1024, 4096), 8, None),
        ((1024, 4096), 256, None),  # 1,024 are enough
        ((1024, 4096), 257, (1026, 4096)),
        ((1024, 4096), 1024, (2560, 4096)),
        ((1024, resource.RLIM_INFINITY), 4096, (8704, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, None),
    ],
)
def test_as_many_as_are_needed_and_no_more(
    limits: tuple[int, int], num_ranks: int, raised: tuple[int, int] | None
) -> None:
    with (
        mock.patch.object(resource, "getrlimit", return_value=limits),
        mock.patch.object(resource, "setrlimit") as set_limits,
    ):
        make_room_for(num_ranks)
    expected = [] if raised is None else [mock.call(resource.RLIMIT_NOFILE, raised)]
    assert set_limits.mock_calls == expected


def test_a_limit_that_cannot_be_raised_says_where_it_can() -> None:
    with (
        mock.patch.object(resource, "getrlimit", return_value=(1024, 4096)),
        mock.patch.object(resource, "setrlimit") as set_limits,
        pytest.raises(
            ValueError, match=r"rank of 4096 may need 8704 open files, and the hard limit .* is 4096"
        ) as error,
    ):
        make_room_for(4096)
    assert "the hard limit on this machine is 4096" in str(error.value)
    assert "ulimit -n 8704" in str(error.value)
    assert not set_limits.mock_calls
