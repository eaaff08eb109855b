"""Examples that `megatron-fipo init` writes: running configurations with all that they read."""
