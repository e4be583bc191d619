"""Free text of published rows means one thing, in the words of several frameworks."""

import pytest

from jaxscale.plan.words import (
    Kept,
    axis_sizes,
    compiler_options,
    kept_activations,
    read_kernel,
    refused_option,
)

ALL = ("query", "key", "value", "attention_out", "gate", "up")


@pytest.mark.parametrize(
    ("policy", "meaning", "kept"),
    [
        ("full", "only the scan carry (layer input) is saved", Kept("full")),
        ("full (default)", "", Kept("full")),
        ("gradient_checkpointing=true", "layer inputs saved", Kept("full")),
        ("minimal", "", Kept("dots")),
        ("dots_saveable", "every dot_general kept", Kept("dots")),
        ("none", "", Kept("none")),
        (
            "custom",
            "custom: scan carry saved; decoder_layer_input, query_proj -> pinned_host; everything "
            "else (attention forward, out_proj, MLP) recomputed",
            Kept("names", ("offload:block_input", "offload:query")),
        ),
        (
            "custom",
            "decoder_layer_input, context (splash), query/key/value(/qkv)_proj saved on device; "
            "out_proj and MLP recomputed",
            Kept("names", ("query", "key", "value", "context")),
        ),
        (
            "custom",
            "decoder_layer_input and mlpwo -> pinned_host; k saved; q, MLP wi recomputed",
            Kept("names", ("offload:block_input", "key"), has_outputs_on_host=True),
        ),
        ("custom", "context=offload, mlpwi_0=device", Kept("names", ("offload:context", "gate"))),
        ("custom", "offloaded: q, k", Kept("names", ("offload:query", "offload:key"))),
        ("custom", "q saved on host", Kept("names", ("offload:query",))),
        ("custom", "decoder_layer_input offloaded", Kept("names", ("offload:block_input",))),
        ("custom", "decoder_layer_input kept", Kept("full")),
        (
            "offload_dots_saveable",
            "",
            Kept("names", tuple(f"offload:{name}" for name in ALL), has_outputs_on_host=True),
        ),
        (
            "save_dot_except_mlpwi",
            "",
            Kept("names", ("query", "key", "value", "attention_out")),
        ),
        ("selective", "every second matmul", None),
        ("", "", None),
    ],
)
def test_kept_activations(policy: str, meaning: str, kept: Kept | None) -> None:
    found = kept_activations(policy, meaning)
    if found is not None and kept is not None:
        assert sorted(found.names) == sorted(kept.names)
        assert found.remat == kept.remat
        assert found.has_outputs_on_host == kept.has_outputs_on_host
    else:
        assert found is kept


def test_axis_sizes() -> None:
    assert axis_sizes("fsdp=64,context=8") == {"fsdp": 64, "sequence": 8}
    assert axis_sizes("data=-1, model=4 (x=3)") == {"data": -1, "tensor": 4}
    assert axis_sizes("expert=8") == {"expert": 8}


def test_kernels() -> None:
    kernel = read_kernel("Pallas splash (causal, segment ids); all sa_block_*=2048, fused bwd")
    assert (kernel.attention, kernel.causal, kernel.segments) == ("flash", True, True)
    assert (kernel.fused_backward, kernel.blocks) == (True, (("all", 2048),))
    assert not kernel.is_balanced
    assert read_kernel("splash; K and V gathered, load balanced").is_balanced
    kernel = read_kernel("flash, causal=False, no segment ids")
    assert (kernel.causal, kernel.segments, kernel.fused_backward) == (False, False, False)
    kernel = read_kernel("sa_block_q=1024 sa_block_q_dkv=2048, other blocks 512, separate bwd")
    assert dict(kernel.blocks) == {"q": 1024, "q_dkv": 2048, "all": 512}
    assert dict(read_kernel("blocks 512/1024/256").blocks) == {
        "q": 512,
        "kv": 1024,
        "kv_compute": 256,
    }
    assert read_kernel("XLA attention").attention == "dense"


def test_compiler_options() -> None:
    flags = (
        "--xla_tpu_a=1 --xla_tpu_a=2 --2a88_chip=x --xla_dump_to=/x --xla_tpu_dump_c=/x "
        "--xla_tpu_spmd_rng_bit_generator_unsafe=true --xla_enable_async_b=true"
    )
    assert compiler_options(flags) == (("xla_tpu_a", "2"), ("xla_enable_async_b", "true"))


def test_refused_option() -> None:
    message = "INVALID_ARGUMENT: No such compile option: 'xla_sc_disjoint_spmem'"
    assert refused_option(message) == "xla_sc_disjoint_spmem"
    assert refused_option("RESOURCE_EXHAUSTED: out of memory") is None
