"""Environments: where what the policy writes meets whoever answers and judges it."""
