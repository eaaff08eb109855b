"""Submits the recipe to a Slurm cluster: cluster.yaml, beside this file, says which and how.

    python examples/qwen2_5_32b/submit.py --dry-run                        what would be submitted
    python examples/qwen2_5_32b/submit.py --account my_account             fipo.yaml
    python examples/qwen2_5_32b/submit.py --recipe dapo train.num_steps=200

Other arguments are those of `megatron-fipo submit`. The Python is one with NeMo-Run: see docs/slurm.md.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # NeMo-Run's environment does not hold the project

from megatron_fipo.cli import main  # noqa: E402 - after its path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", choices=("fipo", "dapo"), default="fipo")
    own, others = parser.parse_known_args()
    os.chdir(ROOT)  # on the cluster, too, the run starts in the project's folder
    recipe = (HERE / f"{own.recipe}.yaml").relative_to(ROOT)
    settings = (HERE / "cluster.yaml").relative_to(ROOT)
    sys.exit(main(["submit", str(recipe), "--cluster", str(settings), *others]))
