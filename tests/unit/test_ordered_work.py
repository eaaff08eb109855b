"""Tickets in order, each to one worker; words to rank 0; an end that all hear of."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from megatron_fipo.parallel import ordered_work
from megatron_fipo.parallel.ordered_work import OrderedWork


def workers(count: int, num_tickets: int, *, is_dealt: bool) -> list[OrderedWork]:
    """The same work as several ranks see it."""
    store, number = HashStore(), next(ordered_work._numbers)
    made = []
    for worker in range(count):
        ordered_work._numbers = iter([number])  # type: ignore[assignment] # as in a process of its own
        made.append(OrderedWork(worker, count, num_tickets, is_dealt=is_dealt, store=store))
    ordered_work._numbers = iter(range(number + 1, 10**6))  # type: ignore[assignment]
    return made


def taken(work: OrderedWork) -> list[int]:
    tickets = []
    while (ticket := work.take()) is not None:
        tickets.append(ticket)
    return tickets


def test_one_worker_takes_all_in_order() -> None:
    (work,) = workers(1, 4, is_dealt=False)
    assert taken(work) == [0, 1, 2, 3]
    work.extend(6)
    assert taken(work) == [4, 5]
    work.tell(b"a")
    work.tell(b"b")
    assert work.told() == [b"a", b"b"]
    assert work.told() == []
    work.end()
    work.extend(9)
    assert work.look()
    assert work.take() is None


@pytest.mark.parametrize("is_dealt", [True, False])
def test_each_ticket_goes_to_one_worker(is_dealt: bool) -> None:
    made = workers(4, 200, is_dealt=is_dealt)
    found: list[list[int]] = [[] for _ in made]

    def take(worker: int) -> Callable[[], None]:
        return lambda: found[worker].extend(taken(made[worker]))

    threads = [threading.Thread(target=take(worker)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ticket for tickets in found for ticket in tickets) == list(range(200))
    assert all(tickets == sorted(tickets) for tickets in found)
    if is_dealt:
        assert found == [list(range(worker, 200, 4)) for worker in range(4)]


@pytest.mark.parametrize("is_dealt", [True, False])
def test_more_tickets_reach_those_who_wait_for_some(is_dealt: bool) -> None:
    first, second = workers(2, 2, is_dealt=is_dealt)
    assert sorted(taken(first) + taken(second)) == [0, 1]
    assert not second.look()
    assert second.take() is None
    first.extend(6)
    second.look()
    assert sorted(taken(first) + taken(second)) == [2, 3, 4, 5], "none is lost that was taken too early"


def test_words_come_to_rank_0_and_an_end_to_all() -> None:
    first, second, third = workers(3, 5, is_dealt=False)
    second.tell(b"two")
    first.tell(b"one")
    third.tell(b"three")
    assert sorted(first.told()) == [b"one", b"three", b"two"]
    assert first.told() == []
    assert not third.look()
    second.end()
    assert third.take() is not None, "it has not looked yet"
    assert third.look()
    assert third.take() is None
    assert first.look()


def test_who_leaves_takes_no_more_and_keeps_nobody_else_from_it() -> None:
    first, second = workers(2, 5, is_dealt=False)
    first.leave()
    assert first.take() is None
    assert not second.look()
    assert second.take() == 0


def test_ranks_that_do_not_work_need_nothing() -> None:
    work = OrderedWork(None, 3, 5, is_dealt=False)
    assert not work.look()
    work.end()
    assert work.is_over


def test_a_meeting_is_over_when_all_have_come_and_rank_0_has_decided() -> None:
    first, second, third = workers(3, 3, is_dealt=True)
    heard: list[list[bytes]] = []

    def decide() -> None:
        heard.append(sorted(first.told()))
        first.extend(9)

    for _ in range(2):
        second.tell(b"two")
        for work in (first, second):
            work.come()
            assert not work.is_met(decide)
        assert heard == []
        third.tell(b"three")
        third.come()
        assert not third.is_met(decide), "rank 0 has not decided yet"
        assert first.is_met(decide)
        assert heard == [[b"three", b"two"]], "what was told before the meeting, once"
        heard.clear()
        assert second.is_met(decide)
        assert third.is_met(decide)
        assert [taken(work) for work in (first, second, third)] in ([[0, 3, 6], [1, 4, 7], [2, 5, 8]], [[], [], []])


def test_a_single_worker_meets_itself() -> None:
    (work,) = workers(1, 1, is_dealt=True)
    work.come()
    assert work.is_met(work.end)
    assert work.is_over


def test_words_that_are_about_no_ticket_leave_the_fair_share_as_it_is() -> None:
    first, _ = workers(2, 8, is_dealt=False)
    first.tell(b"many", about_ticket=False)
    first.tell(b"one")
    assert first.told() == [b"many", b"one"]
    first.extend(9)
    assert first.fair_share == 4, "one of nine is done"
