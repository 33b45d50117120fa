# ruff: noqa: E501 (a line of the program is a line)
"""Reading compiled programs: what a step moves, counted by hand, and by XLA where there is no loop."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.tpu import hlo, traffic

# Written by hand after what the TPU compiler prints. Three trips; main memory unless a layout says S(1).
PROGRAM = """\
HloModule step, is_scheduled=true

%sliced (param_0: f32[3,8,4], param_1: s32[]) -> f32[8,4] {
  %param_0 = f32[3,8,4]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[1,8,4]{2,1,0:T(8,128)S(1)} dynamic-slice(%param_0, %param_1, %zero, /*index=3*/%zero), dynamic_slice_sizes={1,8,4}
}

%outer (param_0: f32[3,8,4], param_1: s32[], param_2: bf16[8,8]) -> bf16[8,4] {
  %param_2 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(2)
  %param_0 = f32[3,8,4]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %inner = f32[1,8,4]{2,1,0:T(8,128)} fusion(%param_0, %param_1), kind=kLoop, calls=%sliced
  ROOT %dot = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%param_2, %inner), dim_labels=bf_io->bf
}

%updated (param_0: bf16[3,8,4], param_1: bf16[8,4], param_2: s32[]) -> bf16[3,8,4] {
  %param_0 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %row = bf16[1,8,4]{2,1,0:T(8,128)(2,1)} bitcast(%param_1)
  ROOT %update = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0, %row, %param_2)
}

%scattered (param_0: f32[8]) -> f32[2] {
  %param_0 = f32[8]{0:T(128)} parameter(0)
  %sum = f32[8]{0:T(128)} all-reduce(%param_0), channel_id=7, to_apply=%add
  %id = u32[] partition-id()
  ROOT %own = f32[2]{0:T(128)} dynamic-slice(%sum, %id), dynamic_slice_sizes={2}
}

%started (param_0: f32[2]) -> f32[8] {
  %param_0 = f32[2]{0:T(128)} parameter(0)
  ROOT %all = f32[8]{0:T(128)} all-gather(%param_0), channel_id=9, dimensions={0}
}

%body (state: (s32[], bf16[8,8], f32[3,8,4], bf16[3,8,4], f32[8], f32[2])) -> (s32[], bf16[8,8], f32[3,8,4], bf16[3,8,4], f32[8], f32[2]) {
  %state = (s32[]{:T(128)}, bf16[8,8]{1,0}, f32[3,8,4]{2,1,0}, bf16[3,8,4]{2,1,0}, f32[8]{0}, f32[2]{0}) parameter(0)
  %trip = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %x = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %weights = f32[3,8,4]{2,1,0:T(8,128)} get-tuple-element(%state), index=2
  %saved = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=3
  %whole = f32[8]{0:T(128)} get-tuple-element(%state), index=4
  %own = f32[2]{0:T(128)} get-tuple-element(%state), index=5
  %y = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%weights, %trip, %x), kind=kOutput, calls=%outer, backend_config={"window_config":{"estimated_cycles":"100"}}
  %next = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} fusion(%saved, %y, %trip), kind=kLoop, calls=%updated, backend_config={"window_config":{"estimated_cycles":"7"}}
  %grads = f32[2]{0:T(128)} fusion(%whole), kind=kCustom, calls=%scattered
  %begun = f32[8]{0:T(128)} fusion(%own), kind=kCustom, calls=%started
  %ended = f32[8]{0:T(128)} fusion(%own), kind=kCustom, calls=%started
  %one = s32[] constant(1)
  %following = s32[] add(%trip, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,8]{1,0}, f32[3,8,4]{2,1,0}, bf16[3,8,4]{2,1,0}, f32[8]{0}, f32[2]{0}) tuple(%following, %x, %weights, %next, %ended, /*index=5*/%grads)
}

%condition (state: (s32[], bf16[8,8], f32[3,8,4], bf16[3,8,4], f32[8], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %state = (s32[]{:T(128)}, bf16[8,8]{1,0}, f32[3,8,4]{2,1,0}, bf16[3,8,4]{2,1,0}, f32[8]{0}, f32[2]{0}) parameter(0)
  %trip = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%trip, %limit), direction=LT
}

ENTRY %main (args: (s32[], bf16[8,8], f32[3,8,4], bf16[3,8,4], f32[8], f32[2])) -> f32[8] {
  %args = (s32[]{:T(128)}, bf16[8,8]{1,0}, f32[3,8,4]{2,1,0}, bf16[3,8,4]{2,1,0}, f32[8]{0}, f32[2]{0}) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,8]{1,0}, f32[3,8,4]{2,1,0}, bf16[3,8,4]{2,1,0}, f32[8]{0}, f32[2]{0}) while(%args), condition=%condition, body=%body
  %v = f32[8]{0:T(128)} get-tuple-element(%loop), index=4
  %fetch = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%v)
  %near = f32[8]{0:T(128)S(1)} copy-done(%fetch)
  %sum = (f32[8]{0:T(128)}, f32[4]{0:T(128)}) all-reduce(%v, %near), channel_id=1, to_apply=%add
  %gathering = (f32[8]{0:T(128)}, f32[16]{0:T(128)}) all-gather-start(%v), channel_id=1, dimensions={0}
  %gathered = f32[16]{0:T(128)} all-gather-done(%gathering)
  ROOT %first = f32[8]{0:T(128)} get-tuple-element(%sum), index=0
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


def test_arrays_and_the_memory_that_they_are_in():
    assert hlo.arrays("(bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, pred[3], s4[5], f32[])") == (
        hlo.Array("bf16", (8, 4), 1),
        hlo.Array("pred", (3,), 0),
        hlo.Array("s4", (5,), 0),
        hlo.Array("f32", (), 0),
    )
    assert [array.bytes for array in hlo.arrays("(bf16[8,4], pred[3], s4[5], f32[], f8e4m3fn[4], token[])")] == [
        *(64, 3, 3, 4, 4, 0)
    ]


def test_the_trips_of_a_loop(module):
    assert module.entry == "main"
    assert module.trips(module.computations["main"]["loop"]) == 3


@pytest.mark.parametrize(
    ("before", "after", "trips"),
    [
        ("compare(%trip, %limit), direction=LT", "compare(%trip, %limit), direction=LE", None),
        ("%limit = s32[]{:T(128)} constant(3)", "%limit = f32[]{:T(128)} constant(1.5)", None),
        ("compare(%trip, %limit), direction=LT", "fusion(%trip, %limit), kind=kLoop, calls=%less_than", None),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"8"}}', 8),
    ],
)
def test_the_trips_are_what_is_written_and_no_guess(before, after, trips):
    module = hlo.parse(PROGRAM.replace(before, after))
    assert module.trips(module.computations["main"]["loop"]) == trips
    assert traffic.unknown_loops(module) == (trips is None)


def test_bytes_to_and_from_memory_count_every_trip(module):
    """Of what a fusion slices, also where that is in a fusion inside of it, the slice; of what it updates, the update."""
    slice_, x, update = 8 * 4 * 4, 8 * 8 * 2, 8 * 4 * 2
    reduce_scatter, gather, add = 4 * (8 + 2), 4 * (2 + 8), 4 + 4
    trip = (slice_ + x) + update + reduce_scatter + 2 * gather + add
    entry = 32 + (32 + 32 + 16)  # the copy reads 8 floats; the all-reduce takes 8 of them here and 8 near, and gives 12
    entry += 32 + 64  # the gather
    assert traffic.memory_bytes(module) == 3 * trip + entry


def test_collectives_count_once_wherever_they_stand(module):
    assert traffic.collectives(module) == [
        ("all-gather", 4, 3 * 32 + 64),
        ("all-reduce", 1, 32 + 16),
        ("reduce-scatter", 3, 3 * 8),
    ]


def test_cycles_add_up(module):
    assert traffic.cycles(module) == 3 * 107


def test_without_loops_the_bytes_are_those_that_xla_counts():
    x, w = jnp.ones((64, 32)), jnp.ones((32, 48))
    compiled = jax.jit(lambda x, w: x @ w).lower(x, w).compile()
    found = traffic.memory_bytes(hlo.parse(compiled.as_text()))
    assert found == compiled.cost_analysis()["bytes accessed"] == 4 * (64 * 32 + 32 * 48 + 64 * 48)


@pytest.mark.parametrize("length", [1, 5])
def test_a_scan_of_jax_has_its_length_as_trips(length):
    compiled = jax.jit(lambda x: lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, length=length)[0])
    module = hlo.parse(compiled.lower(jnp.ones((4, 4))).compile().as_text())
    loops = [line for lines in module.computations.values() for line in lines.values() if line.kind == "while"]
    assert [module.trips(loop) for loop in loops] in ([length], [] if length == 1 else [length])


def test_a_loop_without_an_end_known_counts_once():
    compiled = jax.jit(lambda x: lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + 1, x)).lower(jnp.ones(4))
    module = hlo.parse(compiled.compile().as_text())
    (loop,) = (line for lines in module.computations.values() for line in lines.values() if line.kind == "while")
    assert module.trips(loop) is None
    assert traffic.memory_bytes(module) > 0
