"""Proof that a config computes the same numbers however it is run."""
