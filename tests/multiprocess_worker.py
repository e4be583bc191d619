"""One process of a run in `test_multiprocess.py`: trains three steps and tells what it held.

The group comes from WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; the arguments are the devices,
the token cache and the stem of the result's name.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from jaxscale import records, runtime
from jaxscale.config import RuntimeConfig


def main(devices: str, source: str, out: str) -> None:
    """Run the process and write its result to OUT.RANK.json."""
    runtime.start(RuntimeConfig(), devices=devices)
    from jaxscale.data.loader import Loader
    from jaxscale.data.token_cache import TokenCache
    from jaxscale.train.state import assemble, init_state
    from jaxscale.train.step import compile_step
    from tests.programs import tiny_config

    mesh = {"data": 2, "fsdp": 4}
    config = tiny_config(mesh=mesh, model={"vocab_size": 264, "width": 64, "hidden": 512})
    assembly = assemble(config)
    state, step = init_state(assembly), compile_step(assembly)
    leaves = jax.tree.leaves(state.params)
    # Replicas of a shard on two devices of this process count once.
    held = {
        (number, str(shard.index)): shard.data.nbytes
        for number, leaf in enumerate(leaves)
        for shard in leaf.addressable_shards
    }
    loader = Loader(
        TokenCache(source),
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=0,
        sharding=assembly.batch_sharding,
    )
    losses, hashes = [], []
    with jax.set_mesh(assembly.mesh):
        for _, batch in zip(range(3), loader.batches(), strict=False):
            state, metrics = step(state, batch)
            losses.append(float(metrics[records.LOSS]))
            hashes.append(int(metrics[records.BATCH_HASH]))
    result = {
        "processes": jax.process_count(),
        "losses": losses,
        "hashes": hashes,
        "rows": np.asarray(loader.local_rows).tolist(),
        "held_bytes": sum(held.values()),
        "total_bytes": sum(x.nbytes for x in leaves),
    }
    pathlib.Path(f"{out}.{jax.process_index()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
