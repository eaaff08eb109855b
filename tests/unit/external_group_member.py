"""A process that joins a group as servers do, and receives one broadcast: PORT NUM_BYTES [WORLD_SIZE].

Without bytes there is no broadcast.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper

TIMEOUT = timedelta(seconds=300)


def main(port: int, num_bytes: int, members: int = 2) -> None:
    torch.set_num_threads(1)
    store, rank, world_size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 1, members, timeout=TIMEOUT))
    prefixed = dist.PrefixStore("weights", store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend("gloo"), prefixed, group_name=GroupName("weights"), timeout=TIMEOUT
    )
    if num_bytes:
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        group.broadcast([buffer], options).wait()
        print(buffer.tolist())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
