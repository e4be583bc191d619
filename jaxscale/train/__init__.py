"""Training: state, step, evaluation, loop."""
