"""Tokens per second of the jitted training step beside plain PyTorch, on this machine's CPU.

    pip install --editable '.[bench]'
    python scripts/bench_train.py [--rounds 9] [--steps 3] [--json FILE]

A GPT of 6 layers x 384 x 6 heads, MLP 1536 (GELU), context 256, batch 12, vocabulary 256, AdamW,
nothing recomputed, in float32 and bfloat16 (PyTorch under autocast). Each contender is a process of
its own with all cores; they take turns, a few steps each, so that what else the machine does falls
on all alike. Before anything counts, all start from the same weights and must give the same losses
over the first steps: they compute one thing. Read the ratios; an absolute speed means little.

All run with the GLIBC_TUNABLES that docs/figures.md advises on a CPU: freed memory is kept.
"""

import argparse
import dataclasses
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from jaxscale import records, runtime

LAYERS, WIDTH, HEADS, HIDDEN, LENGTH, ROWS, VOCAB = 6, 384, 6, 1536, 256, 12, 256
LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
DTYPES = ("float32", "bfloat16")
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (
        ("hugetlb", 1),
        ("mmap_max", 0),
        ("trim_threshold", 2**36),
        ("arena_max", 1),
    )
)
CONTENDERS = ("jaxscale", "torch eager", "torch compile")
# Steps before anything counts, whose losses must agree: float32 differs by the order of sums, and
# bfloat16 (8 bits) also by where it is rounded.
WARMUP_STEPS = 5
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}

Step = Callable[[], float]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the benchmark; `--tiny` has others, for the test of this script."""

    layers: int = LAYERS
    width: int = WIDTH
    heads: int = HEADS
    hidden: int = HIDDEN
    length: int = LENGTH
    rows: int = ROWS
    vocab: int = VOCAB

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length


TINY = Shape(layers=2, width=32, heads=2, hidden=64, length=32, rows=2, vocab=64)


def draw_weights(shape: Shape) -> Arrays:
    """Return weights of a normal distribution (std 0.02), each stacked over the layers."""
    dice = np.random.default_rng(0)
    D, F, L = shape.width, shape.hidden, shape.layers
    sizes = {
        "embedding": (shape.vocab, D),
        "positions": (shape.length, D),
        "query": (L, D, D),
        "key": (L, D, D),
        "value": (L, D, D),
        "out": (L, D, D),
        "up": (L, D, F),
        "down": (L, F, D),
    }
    return {name: 0.02 * dice.standard_normal(size, np.float32) for name, size in sizes.items()}


def draw_batch(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets, (rows, length)."""
    stream = np.random.default_rng(1).integers(0, shape.vocab, (shape.rows, shape.length + 1))
    return stream[:, :-1], stream[:, 1:]


def make_jaxscale(shape: Shape, dtype: str) -> Step:
    """Return the compiled step of jaxscale as a function that gives the loss."""
    import jax

    from jaxscale import config, runtime
    from jaxscale.resolve import resolve
    from jaxscale.train.state import BATCH_DTYPES, assemble, init_state
    from jaxscale.train.step import compile_step

    runtime.set_jax_flags()
    assembly = assemble(
        resolve(
            config.Config(
                model=config.ModelConfig(
                    num_layers=shape.layers,
                    width=shape.width,
                    num_heads=shape.heads,
                    hidden=shape.hidden,
                    vocab_size=shape.vocab,
                    norm="layernorm",
                    mlp="plain",
                    activation="gelu",
                    attention="chunked",
                    positions="learned",
                    tie_embeddings=True,
                    compute_dtype=dtype,
                    remat="none",
                    scan_unroll=shape.layers,
                ),
                mesh=config.MeshConfig(data=1),
                data=config.DataConfig(length=shape.length),
                train=config.TrainConfig(global_batch_size=shape.rows),
                optimizer=config.OptimizerConfig(
                    learning_rate=LEARNING_RATE,
                    schedule="constant",
                    warmup_steps=0,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    epsilon=EPSILON,
                    weight_decay=DECAY,
                    clip_norm=CLIP,
                ),
            )
        ),
        jax.devices()[:1],
    )
    state = init_state(assembly, _jaxscale_params(shape, draw_weights(shape)))
    tokens, targets = draw_batch(shape)
    ones = np.ones_like(tokens)
    arrays = {"tokens": tokens, "targets": targets, "segments": ones, "weights": ones}
    batch = {
        name: jax.device_put(value.astype(BATCH_DTYPES[name]), assembly.batch_sharding)
        for name, value in arrays.items()
    }
    program = compile_step(assembly)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(assembly.mesh):
            state, metrics = program(state, batch)
            return float(metrics[records.LOSS])

    return step


def _jaxscale_params(shape: Shape, weights: Arrays) -> dict[str, Any]:
    L, D, N = shape.layers, shape.width, shape.heads
    heads = {name: weights[name].reshape(L, D, N, D // N) for name in ("query", "key", "value")}
    ones = {"scale": np.ones((L, D), np.float32)}
    return {
        "embedding": weights["embedding"],
        "positions": weights["positions"],
        "norm": {"scale": np.ones(D, np.float32)},
        "blocks": {
            "attention_norm": ones,
            "mlp_norm": ones,
            "attention": {**heads, "out": weights["out"].reshape(L, N, D // N, D)},
            "mlp": {"up": weights["up"], "down": weights["down"]},
        },
    }


def make_torch(shape: Shape, dtype: str, *, compiled: bool) -> Step:
    """Return the same step in PyTorch, as its users write it: fused AdamW, fused attention."""
    import torch

    model = _torch_model(shape, draw_weights(shape))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    tokens, targets = (torch.from_numpy(array) for array in draw_batch(shape))
    loss_of = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def _torch_model(shape: Shape, weights: Arrays) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    D, N = shape.width, shape.heads

    def linear(matrix: np.ndarray) -> nn.Linear:
        layer = nn.Linear(*matrix.shape, bias=False)
        layer.weight.data = torch.from_numpy(np.ascontiguousarray(matrix.T))
        return layer

    class Block(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            joined = [weights[name][layer] for name in ("query", "key", "value")]
            self.attention_norm = nn.LayerNorm(D, bias=False)
            self.mlp_norm = nn.LayerNorm(D, bias=False)
            self.qkv = linear(np.concatenate(joined, axis=1))
            self.out = linear(weights["out"][layer])
            self.up = linear(weights["up"][layer])
            self.down = linear(weights["down"][layer])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, L, _ = x.shape
            parts = self.qkv(self.attention_norm(x)).split(D, dim=2)
            q, k, v = (part.view(B, L, N, D // N).transpose(1, 2) for part in parts)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
            return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape.vocab, D)
            self.positions = nn.Embedding(shape.length, D)
            self.embedding.weight.data = torch.from_numpy(weights["embedding"])
            self.positions.weight.data = torch.from_numpy(weights["positions"])
            self.blocks = nn.ModuleList([Block(layer) for layer in range(shape.layers)])
            self.norm = nn.LayerNorm(D, bias=False)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens) + self.positions(torch.arange(shape.length))[None]
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.embedding.weight)
            return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Decoder()


def serve(contender: str, dtype: str, shape: Shape, pipe: Connection) -> None:
    """Make a step in this process, send its first losses, then time steps as often as asked."""
    if contender == "jaxscale":
        step = make_jaxscale(shape, dtype)
    else:
        step = make_torch(shape, dtype, compiled=contender == "torch compile")
    pipe.send([step() for _ in range(WARMUP_STEPS)])
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            step()
        pipe.send(time.perf_counter() - start)


class Contender:
    """A step in a process of its own, idle but for its turns."""

    def __init__(self, name: str, dtype: str, shape: Shape) -> None:
        self.name, self.dtype, self._tokens = name, dtype, shape.tokens
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, dtype, shape, theirs))
        self._process.start()
        theirs.close()
        self.losses: list[float] = self._pipe.recv()
        self.speeds: list[float] = []

    def take_turn(self, steps: int) -> None:
        """Run some steps and note the tokens per second."""
        self._pipe.send(steps)
        self.speeds.append(steps * self._tokens / self._pipe.recv())

    def close(self) -> None:
        """End the process."""
        self._pipe.send(0)
        self._process.join()


def check_losses(contenders: Sequence[Contender]) -> None:
    """Raise ArithmeticError unless all contenders computed the same first losses."""
    first = contenders[0]
    for other in contenders[1:]:
        for a, b in zip(first.losses, other.losses, strict=True):
            if not math.isclose(a, b, rel_tol=LOSS_TOLERANCE[first.dtype]):
                raise ArithmeticError(
                    f"{first.dtype}: {first.name} has losses {first.losses} and {other.name} "
                    f"{other.losses}; they do not train the same model"
                )


def measure(dtype: str, shape: Shape, *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Let all contenders take turns, and return a row for each: speeds and ratios to jaxscale's."""
    contenders = [Contender(name, dtype, shape) for name in CONTENDERS]
    try:
        check_losses(contenders)
        for number in range(rounds):
            # Each follows each other equally often.
            for place in range(len(contenders)):
                contenders[(place + number) % len(contenders)].take_turn(steps)
    finally:
        for contender in contenders:
            contender.close()
    return [summary(contender, contenders[0]) for contender in contenders]


def summary(contender: Contender, ours: Contender) -> dict[str, Any]:
    """Return median and range of the tokens per second, and of jaxscale's over them per round."""
    ratios = [a / b for a, b in zip(ours.speeds, contender.speeds, strict=True)]
    return {
        "dtype": contender.dtype,
        "contender": contender.name,
        "losses": contender.losses,
        "tokens_per_second": statistics.median(contender.speeds),
        "tokens_per_second_range": [min(contender.speeds), max(contender.speeds)],
        "jaxscale_ratio": statistics.median(ratios),
        "jaxscale_ratio_range": [min(ratios), max(ratios)],
    }


def show(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    slowest, fastest = row["tokens_per_second_range"]
    low, high = row["jaxscale_ratio_range"]
    return (
        f"{row['dtype']:9} {row['contender']:14} {row['tokens_per_second']:7.0f} tokens/s "
        f"({slowest:.0f} to {fastest:.0f})   jaxscale / it: {row['jaxscale_ratio']:.2f} "
        f"({low:.2f} to {high:.2f})"
    )


def main() -> int:
    """Measure, print a line per contender, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--tiny", action="store_true", help="try the script out; means no speed")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing; pip install --editable '.[bench]'")
    # Read when the contenders' processes start.
    os.environ |= {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": TUNABLES}
    shape = TINY if args.tiny else Shape()
    rows = []
    for dtype in args.dtype or DTYPES:
        for row in measure(dtype, shape, rounds=args.rounds, steps=args.steps):
            rows.append(row)
            print(show(row), flush=True)
    if args.json:
        result = records.envelope(
            "bench_train",
            rows,
            config=dataclasses.asdict(shape),
            environment={
                "cores": os.cpu_count(),
                "versions": runtime.versions((*runtime.PACKAGES, "torch")),
            },
        )
        records.write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
