"""Predicts a training step before it runs, and is held against published runs."""
