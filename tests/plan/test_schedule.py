"""The text of a TPU program becomes events: what computes, what is sent, what is waited for."""

# ruff: noqa: E501  (a compiler's lines are as long as they are)

import pytest

from jaxscale.config import ConfigError
from jaxscale.plan.schedule import Kernel, Loop, Operation, Send, Wait, read_schedule

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
HEAD = "%f (p: bf16[64,64]) -> bf16[64,64] {\n"
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def program(*lines: str, before: str = "") -> str:
    """Return a program whose entry has these instructions after its parameter."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule m
{before}
ENTRY %main (p: bf16[64,64]) -> bf16[64,64] {{
  %p = bf16[64,64]{{1,0:T(8,128)(2,1)}} parameter(0)
{body}
}}
"""


def test_a_matmul_has_its_cycles_flops_bytes_and_source() -> None:
    dot = (
        "%d = bf16[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
        f'metadata={{op_name="jit(step)/jvp()/mlp/dot_general"}}, {CYCLES % 500}'
    )
    (event,) = read_schedule(program(dot))
    size = 64 * 64 * 2
    assert event == Operation(500, 2.0 * 64**3, 3 * size, "jit(step)/jvp()/mlp/dot_general")


def test_an_estimate_that_is_none_is_left_out() -> None:
    (event,) = read_schedule(program(f"%c = bf16[64,64]{{1,0}} tanh(%p), {CYCLES % (2**63 - 1)}"))
    assert isinstance(event, Operation) and event.cycles is None


def test_what_lies_in_vector_memory_moves_no_bytes() -> None:
    lines = (
        "%c = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy(%p)",
        "%d = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy(%c)",
    )
    first, second = read_schedule(program(*lines))
    assert isinstance(first, Operation) and isinstance(second, Operation)
    assert (first.hbm_bytes, second.hbm_bytes) == (64 * 64 * 2, 0)


def test_a_fusion_reads_the_slice_it_uses_and_writes_the_update_it_makes() -> None:
    before = """%inner (stack: bf16[8,64,64], at: s32[]) -> bf16[8,64,64] {
  %stack = bf16[8,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %put = bf16[8,64,64]{2,1,0} dynamic-update-slice(%stack, %one, %at, %zero, %zero)
}
"""
    lines = (
        "%stack = bf16[8,64,64]{2,1,0} broadcast(%p), dimensions={1,2}",
        "%at = s32[] constant(3)",
        "%f = bf16[8,64,64]{2,1,0} fusion(%stack, %at), kind=kLoop, calls=%inner",
    )
    events = read_schedule(program(*lines, before=before))
    fusion = events[-1]
    assert isinstance(fusion, Operation)
    # Of what is read, the slice; of what is written, the update.
    assert fusion.hbm_bytes == (1 + 1) * 64 * 64 * 2 + 4


def test_a_fusion_in_a_fusion_reads_a_slice_and_a_collective_in_it_writes_nothing() -> None:
    before = """%rename (stack: bf16[8,64,64]) -> bf16[8,64,64] {
  %stack = bf16[8,64,64]{2,1,0} parameter(0)
  ROOT %renamed = bf16[8,64,64]{2,1,0} copy(%stack)
}

%cut (stack: bf16[8,64,64], at: s32[]) -> bf16[1,64,64] {
  %stack = bf16[8,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %renamed = bf16[8,64,64]{2,1,0} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%rename
  ROOT %one = bf16[1,64,64]{2,1,0} dynamic-slice(%renamed, %at, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

%inner (stack: bf16[8,64,64], at: s32[], part: bf16[16,64]) -> (bf16[1,64,64], bf16[64,64]) {
  %stack = bf16[8,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %part = bf16[16,64]{1,0} parameter(2)
  %one = bf16[1,64,64]{2,1,0} fusion(%stack, %at), kind=kLoop, calls=%cut
  %all = bf16[64,64]{1,0} all-gather(%part), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %both = (bf16[1,64,64]{2,1,0}, bf16[64,64]{1,0}) tuple(%one, %all)
}
"""
    lines = (
        "%stack = bf16[8,64,64]{2,1,0} broadcast(%p), dimensions={1,2}",
        "%at = s32[] constant(3)",
        "%part = bf16[16,64]{1,0} slice(%p), slice={[0:16], [0:64]}",
        "%f = (bf16[1,64,64]{2,1,0}, bf16[64,64]{1,0}) fusion(%stack, %at, %part), kind=kLoop, "
        "calls=%inner",
    )
    events = read_schedule(program(*lines, before=before))
    fusion = [event for event in events if isinstance(event, Operation)][-1]
    assert fusion.hbm_bytes == (1 + 1) * 64 * 64 * 2 + 4 + 16 * 64 * 2


def test_a_collective_is_waited_for_at_once_or_where_it_ends() -> None:
    groups = "replica_groups={{0,1,2,3}}, to_apply=%sum"
    lines = (
        f"%now = bf16[64,64]{{1,0}} all-reduce(%p), {groups}",
        f"%start = bf16[64,64]{{1,0}} all-reduce-start(%p), {groups}",
        "%busy = bf16[64,64]{1,0} copy(%p)",
        "%done = bf16[64,64]{1,0} all-reduce-done(%start)",
    )
    events = read_schedule(program(*lines, before=SUM))
    assert [type(event) for event in events] == [Send, Wait, Send, Operation, Wait]
    sent, waited = events[2], events[4]
    assert isinstance(sent, Send) and isinstance(waited, Wait)
    assert sent.key == waited.key == "start"
    assert sent.collective is not None
    assert (sent.collective.kind, sent.collective.group_size) == ("all-reduce", 4)
    assert sent.collective.payload_bytes == 64 * 64 * 2


def test_a_sparse_core_works_off_collectives_meanwhile() -> None:
    before = f"""{SUM}
%worked_off (p: bf16[64,64]) -> bf16[64,64] {{
  %p0 = bf16[64,64]{{1,0}} parameter(0)
  ROOT %all = bf16[64,64]{{1,0}} all-reduce(%p0), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
}}, execution_thread="sparsecore"
"""
    lines = (
        '%start = (()) custom-call-start(), async_execution_thread="sparsecore", '
        'custom_call_target="x", called_computations={%worked_off}',
        "%busy = bf16[64,64]{1,0} copy(%p)",
        "%update = (()) custom-call-update(%start)",
        "%done = bf16[64,64]{1,0} custom-call-done(%update)",
    )
    sent, _, waited = read_schedule(program(*lines, before=before))
    assert isinstance(sent, Send) and isinstance(waited, Wait)
    assert sent.on_sparse_core and sent.key == waited.key == "start"
    assert sent.collective and sent.collective.payload_bytes == 64 * 64 * 2


@pytest.mark.parametrize("opcode", ["custom-call-start", "dance-start"])
def test_what_nobody_can_time_is_an_error(opcode: str) -> None:
    line = f'%s = bf16[64,64]{{1,0}} {opcode}(%p), custom_call_target="polka"'
    with pytest.raises(ConfigError, match="cannot tell the time of"):
        read_schedule(program(line))


def test_what_only_moves_is_known_by_its_bytes() -> None:
    lines = (f"%{op} = bf16[64,64]{{1,0}} {op}(%p), {CYCLES % 12}" for op in ("copy", "tanh"))
    events = read_schedule(program(*lines))
    assert [e.cycles for e in events if isinstance(e, Operation)] == [None, 12]


def test_a_sum_of_which_a_device_keeps_its_part_is_a_reduce_scatter() -> None:
    before = f"""{SUM}
%cut (p: bf16[64,64]) -> bf16[16,64] {{
  %p0 = bf16[64,64]{{1,0}} parameter(0)
  %all = bf16[64,64]{{1,0}} all-reduce(%p0), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
  %at = s32[] constant(16)
  %zero = s32[] constant(0)
  ROOT %own = bf16[16,64]{{1,0}} dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={{16,64}}
}}
"""
    line = "%f = bf16[16,64]{1,0} fusion(%p), kind=kCustom, calls=%cut"
    sends = [e for e in read_schedule(program(line, before=before)) if isinstance(e, Send)]
    assert [sent.collective and sent.collective.kind for sent in sends] == ["reduce-scatter"]
    assert sends[0].collective and sends[0].collective.payload_bytes == 64 * 64 * 2


CHAIN = """%begin (p: bf16[16,64]) -> (bf16[16,64], bf16[64,64]) {
  %p0 = bf16[16,64]{1,0} parameter(0)
  %g = bf16[64,64]{1,0} all-gather(%p0), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %c = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%middle (p: bf16[16,64]) -> bf16[16,64] {
  %p1 = bf16[16,64]{1,0} parameter(0)
  ROOT %g1 = bf16[64,64]{1,0} all-gather(%p1), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
}
%end (p: bf16[16,64]) -> bf16[64,64] {
  %p2 = bf16[16,64]{1,0} parameter(0)
  %g2 = bf16[64,64]{1,0} all-gather(%p2), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %e = bf16[64,64]{1,0} custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_chain_of_fusions_is_one_collective() -> None:
    lines = (
        "%part = bf16[16,64]{1,0} slice(%p), slice={[0:16], [0:64]}",
        "%b = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) fusion(%part), kind=kCustom, calls=%begin",
        "%m = bf16[16,64]{1,0} fusion(%part), kind=kCustom, calls=%middle",
        "%e = bf16[64,64]{1,0} fusion(%part), kind=kCustom, calls=%end",
    )
    events = read_schedule(program(*lines, before=CHAIN))
    sends = [event for event in events if isinstance(event, Send)]
    waits = [event for event in events if isinstance(event, Wait)]
    assert [send.key for send in sends] == [wait.key for wait in waits] == ["chain 7"]
    assert events.index(sends[0]) < events.index(waits[0]) - 1


def test_copies_to_the_host_are_sent_and_those_ahead_to_a_core_are_not() -> None:
    lines = (
        "%out = (bf16[64,64]{1,0:S(5)}, bf16[64,64]{1,0}, u32[]) copy-start(%p)",
        "%out.done = bf16[64,64]{1,0:S(5)} copy-done(%out)",
        "%ahead = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]) copy-start(%p)",
        "%ahead.done = bf16[64,64]{1,0:S(1)} copy-done(%ahead)",
    )
    events = read_schedule(program(*lines))
    assert events == (Send("out", None, host_bytes=64 * 64 * 2), Wait("out"))


def test_a_loop_has_its_count_and_a_kernel_its_blocks() -> None:
    before = """%body (t: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %t = (s32[], bf16[64,64]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[64,64]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  %kernel.3 = bf16[64,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 256}"
}}, metadata={op_name="jit(step)/attention/kernel"}
  ROOT %r = (s32[], bf16[64,64]) tuple(%n, %kernel.3)
}
%condition (t: (s32[], bf16[64,64])) -> pred[] {
  %t = (s32[], bf16[64,64]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}
"""
    lines = (
        "%zero = s32[] constant(0)",
        "%start = (s32[], bf16[64,64]) tuple(%zero, %p)",
        "%loop = (s32[], bf16[64,64]) while(%start), condition=%condition, body=%body",
    )
    (loop,) = read_schedule(program(*lines, before=before))
    assert isinstance(loop, Loop) and loop.count == 5
    kernels = [event for event in loop.body if isinstance(event, Kernel)]
    assert [kernel.name for kernel in kernels] == ["kernel"]
    assert dict(kernels[0].blocks) == {"block_q": 512, "block_kv": 256}
    assert kernels[0].source == "jit(step)/attention/kernel"


def test_a_custom_call_that_nobody_knows_is_an_error() -> None:
    call = '%c = bf16[64,64]{1,0} custom-call(%p), custom_call_target="Mystery"'
    with pytest.raises(ConfigError, match="cannot tell the time of a custom call Mystery"):
        read_schedule(program(call))


def test_a_transfer_between_slices_is_one_send_and_one_wait() -> None:
    kind = '_xla_megascale_transfer_type="ALL_REDUCE"'
    lines = (
        "%token = token[] after-all()",
        "%send = (f32[70,8,128]{2,1,0}, u32[], token[]) send(%p, %token), channel_id=1, "
        f"frontend_attributes={{{kind}}}",
        "%recv = (f32[70,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=2, "
        f"frontend_attributes={{{kind}}}",
        "%send-done = token[] send-done(%send), channel_id=1",
        "%recv-done = (f32[70,8,128]{2,1,0}, token[]) recv-done(%recv), channel_id=2",
    )
    send, wait = read_schedule(program(*lines))
    assert isinstance(send, Send) and wait == Wait("recv")
    assert send.collective is not None
    assert send.collective.kind == "slices all-reduce"
    assert send.collective.payload_bytes == 70 * 8 * 128 * 4
