"""The reader of compiled programs, on a text counted by hand and on programs compiled here."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretraining import hlo

# A loop of five rounds (its length stands in the condition) in which an asynchronous all-gather
# doubles 2 x 4 bfloat16, and a loop of three (written beside it) inside of it; an all-reduce that
# two fusions share; a permutation in a wrapped call; a reduce-scatter whose operand is the larger,
# and one as TPUs have it, an all-reduce of 12 float32 of which a fusion keeps 6.
TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner_body (p.1: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p.1 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) parameter(0)
  %g.1 = f32[10]{0:T(128)} get-tuple-element(%p.1), index=1
  %scatter = f32[5]{0} reduce-scatter(%g.1), channel_id=7, dimensions={0}, to_apply=%add
}

%inner_condition (p.2: (s32[], f32[10])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%body (p.3: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %p.3 = (s32[]{:T(128)}, bf16[2,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %g.3 = bf16[2,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p.3), index=1
  %start = (bf16[2,4]{1,0}, bf16[4,4]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%g.3), channel_id=1
  %done = bf16[4,4]{1,0} all-gather-done(%start)
  %t.3 = (s32[], f32[10]{0}) tuple(%p.3, %g.3)
  %while.1 = (s32[], f32[10]{0}) while(%t.3), condition=%inner_condition, body=%inner_body, KNOWN
}

%condition (p.4: (s32[], bf16[2,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %p.4 = (s32[]{:T(128)}, bf16[2,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%fused.1 (p.5: f32[8]) -> (f32[8], f32[1000,1000]) {
  %p.5 = f32[8]{0} parameter(0)
  %huge = f32[1000,1000]{1,0} broadcast(%p.5), dimensions={0}
  %reduced.1 = f32[8]{0} all-reduce(%p.5), channel_id=2, to_apply=%add
}

%fused.2 (p.6: f32[8]) -> f32[8] {
  %p.6 = f32[8]{0} parameter(0)
  %reduced.2 = f32[8]{0} all-reduce(%p.6), channel_id=2, to_apply=%add
}

%all-reduce-scatter.3 (p.8: f32[12]) -> f32[6] {
  %p.8 = f32[12]{0} parameter(0)
  %reduced.3 = f32[12]{0} all-reduce(%p.8), channel_id=9, to_apply=%add
  ROOT %slice = f32[6]{0} dynamic-slice(%reduced.3, %place), dynamic_slice_sizes={6}
}

%wrapped (p.7: u8[16]) -> u8[16] {
  %p.7 = u8[16]{0} parameter(0)
  ROOT %moved = u8[16]{0} collective-permute(%p.7), channel_id=3, source_target_pairs={{0,1}}
}

ENTRY %main.1_spmd (param: f32[8]) -> f32[8] {
  %param = f32[8]{0} parameter(0), sharding={devices=[2]<=[2]}
  %t.1 = (s32[], bf16[2,4]{1,0}, /*index=2*/f32[3]{0}) tuple(%param)
  %while.2 = (s32[], bf16[2,4]{1,0}) while(%t.1), condition=%condition, body=%body
  %begin = (f32[8]{0}, f32[7]{0}) fusion(%param), kind=kCustom, calls=%fused.1
  %end = f32[8]{0} fusion(%param), kind=kCustom, calls=%fused.2
  %twelve = f32[12]{0} broadcast(%param), dimensions={0}
  %six = f32[6]{0} fusion(%twelve), kind=kCustom, calls=%all-reduce-scatter.3
  %bytes = u8[16]{0} convert(%param)
  %call = ((u8[16]{0}), u8[16]{0}, u32[]) async-start(%bytes), calls=%wrapped
  %answer = u8[16]{0} async-done(%call), calls=%wrapped
  ROOT %copy = f32[8]{0} copy(%end)
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_the_hand_made_program_is_read():
    module = hlo.parse(TEXT)
    assert module.entry == "main.1_spmd"
    assert len(module.computations) == 10
    tuple_ = module.computations["main.1_spmd"]["t.1"]
    assert tuple_.arrays == (("s32", ()), ("bf16", (2, 4)), ("f32", (3,)))
    assert [array.bytes for array in tuple_.arrays] == [4, 16, 12]
    start = module.computations["body"]["start"]
    assert (start.opcode, start.operands) == ("all-gather-start", ("g.3",))


def test_collectives_are_counted_as_often_as_they_run():
    assert hlo.collectives(hlo.parse(TEXT)) == {
        "all-gather": (5, 5 * 4 * 4 * 2),
        "all-reduce": (1, 8 * 4),
        "collective-permute": (1, 16),
        "reduce-scatter": (5 * 3 + 1, 15 * 10 * 4 + 12 * 4),
    }


def test_loops_without_a_told_length_count_once():
    untold = TEXT.replace("direction=LT", "direction=GT").replace("known_trip_count", "unknown")
    traffic = hlo.collectives(hlo.parse(untold))
    assert (traffic["all-gather"].count, traffic["reduce-scatter"].count) == (1, 1 + 1)


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%gather, %permute, %nothing}",
        "true_computation=%permute, false_computation=%gather",
    ],
)
def test_a_conditional_counts_as_the_branch_that_moves_most(branches):
    """One gathering of 64 bytes, in a call, outweighs two permutations of 16."""
    text = """
%inner (a: u8[32]) -> u8[64] {
  %a = u8[32]{0} parameter(0)
  ROOT %gathered = u8[64]{0} all-gather(%a), channel_id=1, dimensions={0}
}

%gather (b: u8[32]) -> u8[64] {
  %b = u8[32]{0} parameter(0)
  ROOT %called = u8[64]{0} call(%b), to_apply=%inner
}

%permute (c: u8[16]) -> u8[64] {
  %c = u8[16]{0} parameter(0)
  %once = u8[16]{0} collective-permute(%c), channel_id=2, source_target_pairs={{0,1}}
  %twice = u8[16]{0} collective-permute(%once), channel_id=3, source_target_pairs={{0,1}}
}

%nothing (d: u8[16]) -> u8[64] {
  %d = u8[16]{0} parameter(0)
}

ENTRY %main (index: s32[], e: u8[32], f: u8[16]) -> u8[64] {
  %index = s32[] parameter(0)
  %e = u8[32]{0} parameter(1)
  %f = u8[16]{0} parameter(2)
  ROOT %result = u8[64]{0} conditional(%index, %e, %f, %f), BRANCHES
}
"""
    module = hlo.parse(text.replace("BRANCHES", branches))
    assert hlo.collectives(module) == {"all-gather": (1, 64)}


def test_collectives_of_a_program_for_a_slice():
    """The gradient of two layers of 256 x 256, in a scan, their rows shared out over a v5e:2x4.

    As libtpu 0.0.42.1 compiled it; all but the loops, the collectives and what they take is left
    out. Each layer is gathered in bfloat16 for the forward and for the backward pass, there in
    three fusions of one channel, and the float32 gradient of each is reduced and scattered.

        def loss(w, x):
            return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] ** 2)
    """
    text = pathlib.Path(__file__).with_name("fsdp_v5e_2x4.hlo").read_text()
    assert hlo.collectives(hlo.parse(text)) == {
        "all-gather": (2 + 2, 4 * 256 * 256 * 2),
        "reduce-scatter": (2, 2 * 256 * 256 * 4),
    }


def test_buffers_are_those_outside_fusions():
    arrays = [array for array, _ in hlo.buffers(hlo.parse(TEXT))]
    assert ("f32", (7,)) in arrays  # the result of a fusion
    assert ("bf16", (4, 4)) in arrays  # in the body of a loop
    assert ("f32", (1000, 1000)) not in arrays


@pytest.mark.parametrize("dtype, bytes", [("pred", 3), ("f8e4m3fn", 3), ("s4", 1.5), ("c64", 24)])
def test_bytes_of_unusual_types(dtype, bytes):
    assert hlo.Array(dtype, (3,)).bytes == bytes


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


def test_collectives_of_a_compiled_loop():
    """Six rounds of a product whose halves of 32 x 4 float32 lie on two devices."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

    def f(h, w):
        return jax.lax.scan(lambda h, _: (jnp.sin(h @ w @ w.T), None), h, None, length=6)[0]

    rows = NamedSharding(mesh, PartitionSpec())
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    compiled = (
        jax.jit(f, in_shardings=(rows, columns), out_shardings=rows)
        .lower(jnp.zeros((32, 16)), jnp.zeros((16, 8)))
        .compile()
    )
    assert hlo.collectives(hlo.parse(compiled.as_text())) == {"all-reduce": (6, 6 * 32 * 16 * 4)}
