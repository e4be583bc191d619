"""Language models by name: `--config=configs/lm.py:NAME[,length=TOKENS][,batch=SEQUENCES]`.

    tiny      1.8M parameters on bytes; trains on a laptop's CPU
    small     10M      125m  GPT-2 small's shape      1b  Llama 3.2 1B's shape
    llama2-7b  llama2-70b  llama3-8b (= 8b)  llama3-70b (= 70b)

    jaxscale train --config=configs/lm.py:tiny --workdir=runs/tiny --devices=cpu:8

trains `tiny` on the Python standard library's source; after 600 steps its bits per byte are below
those of a bigram model (`jaxscale evaluate --workdir=runs/tiny --baselines` prints both). From `1b`
on set `data.tokenizer` to the tokenizer.json that fits the vocabulary.
"""

from ml_collections import ConfigDict

LLAMA3_ROPE = {
    "rope_theta": 500_000.0,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_length": 8192,
}

# What differs from the defaults of jaxscale/config.py: (model section, tokens, sequences per step).
PRESETS = {
    "tiny": (
        # The shape is that of the defaults.
        {"compute_dtype": "float32", "remat": "none"},
        256,
        8,
    ),
    "small": (
        {"width": 320, "hidden": 896},
        512,
        32,
    ),
    "125m": (
        {
            "num_layers": 12,
            "width": 768,
            "num_heads": 12,
            "hidden": 3072,
            "vocab_size": 50_304,
            "norm": "layernorm",
            "mlp": "plain",
            "activation": "gelu_tanh",
            "biases": "all",
            "positions": "learned",
            "tie_embeddings": True,
        },
        1024,
        256,
    ),
    "1b": (
        {
            "num_layers": 16,
            "width": 2048,
            "num_heads": 32,
            "num_kv_heads": 8,
            "hidden": 8192,
            "vocab_size": 128_256,
            "tie_embeddings": True,
            **LLAMA3_ROPE,
            "rope_factor": 32.0,
        },
        2048,
        256,
    ),
    "llama2-7b": (
        {"num_layers": 32, "width": 4096, "num_heads": 32, "hidden": 11_008, "vocab_size": 32_000},
        4096,
        512,
    ),
    "llama2-70b": (
        {
            "num_layers": 80,
            "width": 8192,
            "num_heads": 64,
            "num_kv_heads": 8,
            "hidden": 28_672,
            "vocab_size": 32_000,
        },
        4096,
        1024,
    ),
    "llama3-8b": (
        {
            "num_layers": 32,
            "width": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "hidden": 14_336,
            "vocab_size": 128_256,
            "rope_theta": 500_000.0,
        },
        8192,
        512,
    ),
    "llama3-70b": (
        {
            "num_layers": 80,
            "width": 8192,
            "num_heads": 64,
            "num_kv_heads": 8,
            "hidden": 28_672,
            "vocab_size": 128_256,
            "rope_theta": 500_000.0,
        },
        8192,
        1024,
    ),
}
ALIASES = {"8b": "llama3-8b", "70b": "llama3-70b"}

# What the presets from a billion parameters on share: the device's own attention kernel, and
# gradients that travel as they were computed; `jaxscale plan` finds it fastest on TPUs.
LARGE = ("1b", "llama2-7b", "llama2-70b", "llama3-8b", "llama3-70b")
LARGE_MODEL = {"attention": "flash"}
LARGE_TRAINING = {"train": {"gradient_reduce_dtype": "bfloat16"}}

# How the presets that run on a laptop are trained; the others take the defaults.
TRAINING = {
    "tiny": {
        "train": {"steps": 600, "eval_every": 200, "sample_every": 200},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 40, "beta2": 0.98},
        "checkpoint": {"every_steps": 200},
    },
    "small": {
        "train": {"steps": 2000, "eval_every": 250, "sample_every": 500},
        "optimizer": {"learning_rate": 1e-3},
    },
}


def get_config(arg: str = "tiny") -> ConfigDict:
    """Return a preset; `arg` is a name, then `length=` and `batch=` in any order."""
    name, *settings = arg.split(",")
    name = ALIASES.get(name, name)
    if name not in PRESETS:
        raise ValueError(f"no preset {name}; there are {', '.join([*PRESETS, *ALIASES])}")
    model, length, batch = PRESETS[name]
    sizes = {"length": length, "batch": batch}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in sizes or not value.isdigit():
            raise ValueError(f"{setting} is neither length=TOKENS nor batch=SEQUENCES")
        sizes[key] = int(value)
    training = LARGE_TRAINING if name in LARGE else TRAINING.get(name, {})
    model = {**LARGE_MODEL, **model} if name in LARGE else model
    return ConfigDict(
        {
            **training,
            "model": model,
            # Small models replicate their parameters; the others shard them over all devices.
            "mesh": {} if name in TRAINING else {"data": 1, "fsdp": -1},
            "data": {"length": sizes["length"]},
            "train": {**training.get("train", {}), "global_batch_size": sizes["batch"]},
        }
    )
