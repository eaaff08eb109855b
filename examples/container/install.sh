#!/usr/bin/env bash
# What both recipes install, stage by stage: system, trainer, servers. Run inside the image, as root.
# Versions are in constraints.txt, constraints-gpu.txt and tools/engines/sglang-gpu.txt.
set -euo pipefail

PROJECT=/opt/megatron_fipo TRAINER=/opt/trainer SERVERS=/opt/servers SGLANG=/opt/sglang
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1

case "${1:-}" in
system)
    # A compiler and Python's headers for Transformer Engine and pycosat, InfiniBand's library for NCCL, NUMA's for
    # SGLang, git for a run's provenance. No cuDNN: torch brings the one it was built with, and a second one would be
    # mixed with it.
    apt-get update
    apt-get install --yes --no-install-recommends python3.12 python3.12-venv python3.12-dev g++ git ca-certificates \
        libibverbs1 ibverbs-providers libnuma1
    rm -rf /var/lib/apt/lists/*
    git config --system --add safe.directory "$PROJECT" # whoever owns the files of the image
    ;;
trainer)
    python3.12 -m venv "$TRAINER"
    "$TRAINER/bin/python" "$PROJECT/tools/engines/trainer_gpu.py"
    ;;
servers)
    python=$(XDG_CACHE_HOME=$SERVERS "$TRAINER/bin/python" "$PROJECT/tools/engines/install.py" sglang-gpu)
    ln -s "${python%/bin/python}" "$SGLANG"
    ;;
*)
    echo "usage: install.sh system | trainer | servers" >&2
    exit 2
    ;;
esac
