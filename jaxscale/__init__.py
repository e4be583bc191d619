"""jaxscale: scale a transformer in JAX from a laptop to a TPU pod to a served endpoint."""

__version__ = "0.1.0"
