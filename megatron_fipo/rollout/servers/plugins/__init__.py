"""Code that runs inside the servers, in their own environments.

This folder stands on a server's PYTHONPATH, so that nothing of the trainer's environment is visible there. What is
below it imports torch, its own package and the server, never `megatron_fipo`.
"""
