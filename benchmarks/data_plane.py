"""How a step's judged responses reach the ranks that train on them: the data plane beside what it replaced.

    python benchmarks/data_plane.py [--nodes 16] [--ranks-per-node 1] [--cp 2] [--divisor 16]

Real ranks over gloo on this machine, with the batch of examples/qwen2_5_32b/fipo.yaml: 2,048 prompts with 16 responses
each, of which 512 prompts are trained on. Each response has 1/divisor of its tokens. The first rank of each node holds
the responses that it would have generated; tp is as large as a node. Both ways run on processes of their own. What each
rank is to train on must be the same in both, bit for bit, and the bytes that the code counts must be those of a
formula; the formula then gives the bytes of the whole recipe on 128 and 1,024 GPUs.

`--only-new` leaves the former way out, which has all responses on every rank, where the memory does not last for it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever the script is called from

from megatron_fipo import quiet  # noqa: F401, I001 - before the packages that it silences

from benchmarks.plane import former, traffic
from benchmarks.plane.responses import Responses, decide, recipe
from benchmarks.plane.traffic import CountedMessages, Places, kernel_counters
from megatron_fipo.config import Config
from megatron_fipo.parallel import cpu, exchange, groups
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.batch import divide
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.rl.trajectory import Group, Trajectory

RECIPE_TP, RECIPE_GPUS_PER_NODE = 8, 8
CLUSTERS = (128, 1024)


@dataclass(frozen=True)
class Task:
    """What every rank is told."""

    places: Places
    divisor: int
    changes: tuple[str, ...] = ()
    """Further overrides of the recipe."""

    @property
    def config(self) -> Config:
        return recipe(self.divisor, self.places.tp, self.places.cp, self.changes)


@dataclass(frozen=True)
class Measured:
    """One rank's numbers, and a digest of each trajectory that it is to train on, by its place in the batch."""

    sent: int
    received: int
    kernel_sent: int
    kernel_received: int
    python_s: float
    cpu_s: float
    wall_s: float
    growth: int
    digests: dict[int, str]
    largest_share: int = 0
    """Bytes of this rank's share, as the former way sends it."""


Step = Callable[[Sequence[Group], Config], dict[int, Trajectory]]
"""From the groups that this rank holds to what it trains on, by place in the batch. Collective."""


def by_data_plane(ranks: ParallelGroups, generates: bool) -> Step:
    """As the trainer does it, from judged groups on."""
    plane = DataPlane(ranks, generates)

    def step(own: Sequence[Group], config: Config) -> dict[int, Trajectory]:
        judged = plane.judged(own)
        plan, group_sizes = decided_by_leader(lambda: decide(judged, config), ranks.world)
        held = {group.prompt.prompt_id: group for group in own}

        def trajectory(index: int) -> Trajectory:
            return held[int(plan["prompt_id"][index])].samples[int(plan["sample_index"][index])]

        wanted = divide(plan["num_tokens"].tolist(), group_sizes, config, ranks.dp.size()).wanted
        samples = plane.deliver(trajectory, plan["leader"], wanted)
        for index, sample in samples.items():
            sample.advantage = float(plan["advantage"][index])
        return samples

    return step


def by_former_way(ranks: ParallelGroups, generates: bool) -> Step:
    """Every rank gets everything."""
    return partial(former.wanted_samples, ranks)


NEW, FORMER = "data plane", "former"
WAYS: dict[str, Callable[[ParallelGroups, bool], Step]] = {NEW: by_data_plane, FORMER: by_former_way}


def run_rank(way: str, task: Task) -> Measured:
    """This rank's part of a step."""
    torch.set_num_threads(1)
    cpu.install()
    places, config = task.places, task.config
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % places.ranks_per_node)
    ranks = groups.initialize(config.parallel, seed=0)
    own: list[Group] = []
    if rank % places.ranks_per_node == 0:
        responses = Responses(config, task.divisor)
        own = [responses.group(prompt_id) for prompt_id in _share(responses, places, rank)]
    measured = _measured(WAYS[way](ranks, bool(own)), own, config, ranks)
    groups.shut_down()
    return replace(measured, largest_share=former.pickled_bytes(own) if way == FORMER and own else 0)


def _share(responses: Responses, places: Places, rank: int) -> range:
    return range(rank // places.ranks_per_node, len(responses.lengths), places.nodes)


def _measured(step: Step, own: Sequence[Group], config: Config, ranks: ParallelGroups) -> Measured:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the responses has left would be used again, and not be growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    exchange.barrier(ranks.world)
    memory, bytes_before = _resident("VmRSS"), kernel_counters()
    wall, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    with CountedMessages() as counted:
        samples = step(own, config)
    thread, process = time.thread_time() - thread, time.process_time() - process
    exchange.barrier(ranks.world)
    wall, growth = time.perf_counter() - wall, _resident("VmHWM") - memory
    out, into = (after - before for after, before in zip(kernel_counters(), bytes_before, strict=True))
    digests = {index: _digest(sample) for index, sample in samples.items()}
    return Measured(counted.sent, counted.received, out, into, thread, process, wall, growth, digests)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _digest(sample: Trajectory) -> str:
    """Of all that training reads of a trajectory."""
    known = (sample.prompt_id, sample.sample_index, sample.finish_reason, tuple(sample.policy_versions))
    digest = hashlib.sha256(repr(known).encode())
    for tensor in (sample.prompt_ids, sample.response_ids, sample.rollout_log_probs, sample.policy_mask):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    digest.update(np.float32(sample.advantage).tobytes())  # as it goes into a microbatch
    return digest.hexdigest()


def check_same(found: Sequence[Measured], expected: Sequence[Measured]) -> int:
    """Responses that ranks train on, counted on each of them.

    Raises:
        AssertionError: if a rank is to train on other responses, or other bits of them.
    """
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.digests, f"rank {rank} trains on nothing"
        assert one.digests.keys() == other.digests.keys(), f"rank {rank} trains on other responses"
        different = [index for index, digest in one.digests.items() if digest != other.digests[index]]
        assert not different, f"rank {rank}: {len(different)} responses differ, the first is {different[0]}"
    return sum(len(one.digests) for one in found)


def check_formula(found: Sequence[Measured], messages: traffic.Messages, plan: traffic.Messages) -> None:
    """
    Raises:
        AssertionError: if a rank has sent or received other bytes than the formula says, or the kernel saw fewer.
    """
    size = len(found)
    assert [one.sent for one in found] == traffic.sent(messages, size)
    assert [one.received for one in found] == traffic.received(messages, size)
    check_kernel(found, messages + plan)


def check_kernel(found: Sequence[Measured], messages: traffic.Messages) -> None:
    """
    Raises:
        AssertionError: if the kernel saw fewer bytes than the formula says, on any rank.
    """
    size = len(found)
    counted = zip(traffic.sent(messages, size), traffic.received(messages, size), strict=True)
    for rank, (one, (out, into)) in enumerate(zip(found, counted, strict=True)):
        assert one.kernel_sent >= out, (rank, one.kernel_sent, out)
        assert one.kernel_received >= into, (rank, one.kernel_received, into)


def measure(way: str, task: Task) -> list[Measured]:
    """Every rank's numbers."""
    preload = ("megatron_fipo.certify.preload",)
    found: list[Measured] = run_local_ranks(run_rank, task.places.world_size, way, task, preload=preload)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--divisor", type=int, default=16, help="each response has this share of its tokens: 1/N")
    parser.add_argument("--only-new", action="store_true", help="leave the former way out")
    args = parser.parse_args()
    places = Places(args.nodes, args.ranks_per_node, args.ranks_per_node, args.cp)
    task = Task(places, args.divisor)
    responses = Responses(task.config, args.divisor)
    print(
        f"{places.nodes} nodes of {places.ranks_per_node} ranks, tp {places.tp}, cp {places.cp}, dp {places.dp}; "
        f"{responses.lengths.size:,} responses, {responses.num_tokens:,} tokens (1/{args.divisor}); gloo, "
        f"{os.cpu_count()} cores for all ranks, torch {torch.__version__}"
    )
    found = {NEW: measure(NEW, task)}
    messages, plan = traffic.of_data_plane(responses, task.config, places)
    check_formula(found[NEW], messages, plan)
    by_formula = {NEW: messages + plan}
    if not args.only_new:
        found[FORMER] = measure(FORMER, task)
        number = check_same(found[NEW], found[FORMER])
        print(f"What ranks train on is the same in both ways, bit for bit ({number:,} responses on all ranks).")
        largest = max(one.largest_share for one in found[FORMER])
        by_formula[FORMER] = traffic.of_former_way(largest, places)
        check_kernel(found[FORMER], by_formula[FORMER])
    print_measured(found, by_formula)
    if not args.only_new:
        first = len(_share(responses, places, 0)) * responses.lengths.shape[1]
        tokens = int(responses.lengths[0 :: places.nodes].sum())
        overhead = (found[FORMER][0].largest_share - 8 * tokens) / first
        print_whole_recipe(overhead)


def print_measured(found: dict[str, list[Measured]], by_formula: dict[str, traffic.Messages]) -> None:
    """A table of what was measured, by way."""
    size = len(found[NEW])
    rows: dict[str, Callable[[str], Sequence[float]]] = {
        "received, MB, by formula": lambda way: [one / 1e6 for one in traffic.received(by_formula[way], size)],
        "received, MB, by the kernel": lambda way: [one.kernel_received / 1e6 for one in found[way]],
        "sent, MB, by formula": lambda way: [one / 1e6 for one in traffic.sent(by_formula[way], size)],
        "sent, MB, by the kernel": lambda way: [one.kernel_sent / 1e6 for one in found[way]],
        "CPU seconds of Python's thread": lambda way: [one.python_s for one in found[way]],
        "CPU seconds of all threads": lambda way: [one.cpu_s for one in found[way]],
        "growth of memory, MB": lambda way: [one.growth / 1e6 for one in found[way]],
        "seconds": lambda way: [one.wall_s for one in found[way]],
    }
    print(f"\n| a rank: mean, largest, rank 0 | {' | '.join(found)} |\n|---|{len(found) * '---:|'}")
    for name, values in rows.items():
        cells = [f"{np.mean(of_way):,.2f}, {max(of_way):,.2f}, {of_way[0]:,.2f}" for of_way in map(values, found)]
        print(f"| {name} | {' | '.join(cells)} |")


def print_whole_recipe(overhead: float) -> None:
    """A table of bytes by formula, with all tokens.

    Args:
        overhead: bytes of a response's pickle that are not its tokens'.
    """
    print(f"\nBy formula, with all tokens; a response's pickle has {overhead:.0f} bytes beside its tokens.\n")
    columns = [f"{gpus:,} GPUs: {way}" for gpus in CLUSTERS for way in (FORMER, NEW)]
    rows: dict[str, list[float]] = {}
    for gpus in CLUSTERS:
        places = Places(gpus // RECIPE_GPUS_PER_NODE, RECIPE_GPUS_PER_NODE, RECIPE_TP, 2)
        config = recipe(1, places.tp, places.cp)
        responses = Responses(config, 1)
        shares = [8 * responses.lengths[leader :: places.nodes] + overhead for leader in range(places.nodes)]
        largest = round(max(share.sum() for share in shares))
        of_plane: traffic.Messages = sum(traffic.of_data_plane(responses, config, places), Counter())
        for messages in (traffic.of_former_way(largest, places), of_plane):
            into = traffic.received(messages, places.world_size)
            between = places.between_nodes(messages)
            for name, value in {
                "into the busiest rank": max(into),
                "into rank 0": into[0],
                "into a node from others, the busiest": max(traffic.received(between, places.nodes)),
                "out of a node to others, the busiest": max(traffic.sent(between, places.nodes)),
                "between all nodes": sum(between.values()),
                "into all ranks of a node, the busiest": max(
                    sum(into[rank] for rank in places.node(index)) for index in range(places.nodes)
                ),
            }.items():
                rows.setdefault(name, []).append(value / 1e6)
    print(f"| MB a step | {' | '.join(columns)} |\n|---|{len(columns) * '---:|'}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(f'{cell:,.1f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
