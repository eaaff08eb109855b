"""Traces: chosen trajectories of a run with all that the objective made of each of their tokens."""
