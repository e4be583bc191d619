"""Attention algorithms; `dense` is the reference that the others must equal."""
