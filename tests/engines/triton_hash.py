"""SGLang's own GPU hash, its Triton kernel run by Triton's interpreter on the CPU: NUM_BYTES ...

Runs in SGLang's environment with TRITON_INTERPRET=1 and prints one hash a line, of random bytes seeded by their number.
"""

import importlib.util
import sys

import torch


def main(sizes: list[int]) -> None:
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.submodule_search_locations is not None  # noqa: PT018
    path = f"{package.submodule_search_locations[0]}/kernels/ops/memory/gpu_tensor_hash.py"
    spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    hashing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hashing)
    for size in sizes:
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        words = torch.cat([raw, raw.new_zeros(-size % 4)]).view(torch.uint32)
        tiles = -(-len(words) // 8192)
        partial = torch.empty(tiles, dtype=torch.uint64)
        # As gpu_tensor_hash launches it; that function itself refuses tensors that are not on a GPU.
        seed = 0x243F6A88
        hashing.hash_tiles32_kernel_blocked[(tiles,)](
            words,
            partial,
            len(words),
            seed1=seed,
            seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
            FM_C1=hashing.FMIX32_C1,
            FM_C2=hashing.FMIX32_C2,
            POS_A=hashing.POS_C1,
            POS_B=hashing.POS_C2,
            TILE=8192,
            BLOCK=256,
            USE_CG=False,
        )
        print(f"{hashing._final_splitmix64(sum(partial.tolist())):016x}")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
