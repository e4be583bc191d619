"""The update rules in plain numpy and float64, for one layer's matrix or vector at a time.

Which dims are rows is said here by the parameters' names, and not by logical axes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

KNOBS: dict[str, float] = {
    "beta1": 0.8,
    "beta2": 0.5,
    "epsilon": 1e-6,
    "weight_decay": 0.3,
    "clip_norm": 50.0,
}
B1, B2, EPSILON = KNOBS["beta1"], KNOBS["beta2"], KNOBS["epsilon"]
# How many leading dims of a layer's array are the matrix's rows; others hold vectors.
ROW_DIMS = {
    "embedding": 1,
    "positions": 1,
    "head": 1,
    "query": 1,
    "key": 1,
    "value": 1,
    "out": 2,
    "gate": 1,
    "up": 1,
    "down": 1,
}
OUTSIDE_BLOCKS = ("embedding", "positions", "head")
# A sum of two terms this much smaller than them has the sign of its rounding.
LEAST_OF_SUM = 2.0**-20

Memory = dict[str, Any]


def adamw(memory: Memory, g: np.ndarray, step: int) -> np.ndarray:
    m = memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    v = memory["v"] = B2 * memory.get("v", 0) + (1 - B2) * g**2
    return m / (1 - B1**step) / (np.sqrt(v / (1 - B2**step)) + EPSILON)


def lion(memory: Memory, g: np.ndarray, step: int) -> np.ndarray:
    m = memory.get("m", np.zeros_like(g))
    mix = B1 * m + (1 - B1) * g
    assert (np.abs(mix) > LEAST_OF_SUM * (np.abs(m) + np.abs(g))).all()
    memory["m"] = B2 * m + (1 - B2) * g
    return np.sign(mix)


def sgd(memory: Memory, g: np.ndarray, step: int) -> np.ndarray:
    memory["m"] = B1 * memory.get("m", 0) + g
    return memory["m"]


def adafactor(memory: Memory, g: np.ndarray, step: int) -> np.ndarray:
    decay = min(1 - step**-0.8, B2)
    squares = g**2 + EPSILON**2
    if g.ndim == 1:
        v = memory["v"] = decay * memory.get("v", 0) + (1 - decay) * squares
    else:
        row = memory["row"] = decay * memory.get("row", 0) + (1 - decay) * squares.mean(1)
        column = memory["column"] = decay * memory.get("column", 0) + (1 - decay) * squares.mean(0)
        v = np.outer(row, column) / row.mean()
    update = g / np.sqrt(v)
    return update / max(1.0, math.sqrt((update**2).mean()))


def muon(memory: Memory, g: np.ndarray, step: int) -> np.ndarray:
    memory["m"] = B1 * memory.get("m", 0) + g
    nesterov = g + B1 * memory["m"]
    u, s, v = np.linalg.svd(nesterov, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(g.shape)) * (u * s) @ v


RULES: dict[str, Callable[[Memory, np.ndarray, int], np.ndarray]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "sgd": sgd,
}


def moved(rule: str, params: Any, gradients: list[Any], rate: float) -> list[np.ndarray]:
    """Return by how much each parameter moves over some steps of given gradients."""
    clipped = []
    for tree in gradients:
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        norm = math.sqrt(sum((leaf**2).sum() for leaf in leaves))
        assert norm > KNOBS["clip_norm"]
        clipped.append([leaf * KNOBS["clip_norm"] / norm for leaf in leaves])
    results = []
    for place, (path, start) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        names = [key.key for key in path]
        of_leaf = [leaves[place] for leaves in clipped]
        if names[0] != "blocks":
            results.append(_moved_alone(rule, names[-1], start, of_leaf, rate))
            continue
        layers = [
            _moved_alone(rule, names[-1], start[i], [g[i] for g in of_leaf], rate)
            for i in range(len(start))
        ]
        results.append(np.stack(layers))
    return results


def _moved_alone(
    rule: str, name: str, start: np.ndarray, gradients: list[np.ndarray], rate: float
) -> np.ndarray:
    rows = math.prod(start.shape[: ROW_DIMS[name]]) if name in ROW_DIMS else None
    shape = (-1,) if rows is None else (rows, -1)
    if rule == "muon" and (rows is None or name in OUTSIDE_BLOCKS):
        rule = "adamw"
    decay = 0.0 if rows is None else KNOBS["weight_decay"]
    p = before = start.astype(np.float64).reshape(shape)
    memory: Memory = {}
    for step, gradient in enumerate(gradients, start=1):
        update = RULES[rule](memory, gradient.reshape(shape), step)
        p = p - rate * (update + decay * p)
    return (p - before).reshape(start.shape)
