"""Everything that reads and runs a bundle; imports no flax, optax, orbax or model code."""
