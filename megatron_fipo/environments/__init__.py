"""Environments, which answer what the policy writes, and judge it."""
