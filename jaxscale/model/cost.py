"""What a decoder costs by its shape alone: parameters and model FLOPs.

Model FLOPs are those of the mathematics, not of the program: nothing recomputed counts, and the
masked half of attention does not. MFU = model FLOPs per second / peak FLOPs per second.
"""

import math

from jaxscale.config import ModelConfig
from jaxscale.model.decoder import Params


def num_parameters(shapes: Params) -> int:
    """Return the number of scalars in a nested dict of arrays or shapes."""
    if not isinstance(shapes, dict):
        return math.prod(shapes.shape)
    return sum(num_parameters(value) for value in shapes.values())


def num_matmul_parameters(model: ModelConfig) -> int:
    """Return the parameters that multiply activations: projections, MLP and head, no embedding."""
    attention = model.width * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    mlp = model.width * model.hidden * (3 if model.mlp == "gated" else 2)
    return model.num_layers * (attention + mlp) + model.width * model.vocab_size


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
    """Return 2 x matmul parameters + 4 x keys seen x heads x head_dim x layers, in FLOPs.

    A token sees length / 2 keys on average, and fewer where `attention_window` is shorter.
    """
    window = min(model.attention_window or length, length)
    seen = window - window**2 / (2 * length)
    attention = 4.0 * seen * model.num_heads * model.head_dim * model.num_layers
    return 2.0 * num_matmul_parameters(model) + attention


def train_flops_per_token(model: ModelConfig, length: int) -> float:
    """Return the model FLOPs of a training step per token: 3 x forward.

    That is 6 x parameters in matmuls (head included, input embedding not) + 6 x length x heads x
    head_dim x layers for the scores and the weighted sum, their causal half counted once
    (Kaplan et al., arXiv:2001.08361; Chowdhery et al., arXiv:2204.02311, appendix B).
    """
    return 3.0 * forward_flops_per_token(model, length)
