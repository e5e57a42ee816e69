"""Stages: teach, encode, distill and grow, the run folder that they share, and what is sampled from it."""
