import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kl_reg.planning import hlo

TEXT = """\
HloModule hand, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cut (p.0: f32[4,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

%write (p.2: f32[4,8], p.3: f32[1,8], p.4: s32[]) -> f32[4,8] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  %p.3 = f32[1,8]{1,0:S(1)} parameter(1)
  %p.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[4,8]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %zero.1)
}

%body (c: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %w = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %row = f32[1,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%cut
  %all = f32[1,8]{1,0} all-reduce(%row), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %near = f32[1,8]{1,0:S(1)} copy(%all)
  %new = f32[4,8]{1,0} fusion(%w, %near, %i), kind=kLoop, calls=%write
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %new)
}

%cond (d: (s32[], f32[4,8])) -> pred[] {
  %d = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %s = (s32[], f32[4,8]{1,0}) tuple(%start, %x)
  %loop = (s32[], f32[4,8]{1,0}) while(%s), condition=%cond, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %begun = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = f32[16,8]{1,0} all-gather-done(%begun)
}
"""


def test_loops_count_as_often_as_they_run():
    found = hlo.traffic(hlo.parse(TEXT))
    assert [(c.kind, c.bytes, c.groups.tolist(), c.times) for c in found.collectives] == [
        ("all-reduce", 32, [[0, 1], [2, 3]], 5), ("all-gather", 512, [[0, 1, 2, 3]], 1)]
    assert found.unknown == []


def test_memory_traffic_by_hand():
    """A turn: the cut row is read and written (32 + 32) with its index (4); the all-reduce reads and writes 32; the
    copy reads 32 and writes on the chip; the row goes from there into the array (32) with an index (4); the counter
    4 + 4 + 4, its constant 1 among them. The all-gather reads 128; its result, with what it was made of, is 128 + 512.
    """
    turn = (32 + 4 + 32) + (32 + 32) + 32 + (4 + 32) + (4 + 4 + 4)
    assert hlo.traffic(hlo.parse(TEXT)).memory == 5 * turn + 128 + 128 + 512


def test_a_loop_without_a_constant_is_said():
    text = TEXT.replace("%five = s32[] constant(5)", "%five = s32[] get-tuple-element(%d), index=0")
    found = hlo.traffic(hlo.parse(text))
    assert found.unknown == ["loop"] and found.collectives[0].times == 1


@pytest.mark.parametrize("text, expected", [
    ("replica_groups={{0,1},{2,3}}, use_global", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]])])
def test_all_notations_of_groups(text, expected):
    assert hlo.groups(text).tolist() == expected


def test_parts_of_one_overlapped_collective_count_once():
    part = ('  %all.{i} = f32[1,8]{{1,0}} all-reduce(%row), replica_groups={{{{0,1}}}}, to_apply=%add, '
            'frontend_attributes={{chain_id="7"}}\n')
    text = TEXT.replace("  %near", "".join(part.format(i=i) for i in range(3)) + "  %near")
    kinds = [(c.kind, c.groups.shape[1]) for c in hlo.traffic(hlo.parse(text)).collectives]
    assert kinds == [("all-reduce", 2), ("all-reduce", 2), ("all-gather", 4)]


def test_what_slices_exchange_is_sent_by_their_runtime():
    sent = ('  %token = token[] after-all()\n  %sent = (f32[1,8]{1,0}, u32[], token[]) send(%row, %token), '
            'channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",'
            '_xla_megascale_transfer_type="ALL_REDUCE"}\n')
    text = TEXT.replace("  %near", sent + "  %near")
    (one,) = [own for own in hlo.traffic(hlo.parse(text)).collectives if not len(own.groups)]
    assert (one.kind, one.bytes, one.groups.shape, one.times) == ("all-reduce", 32, (0, 4), 5)


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("hello")
    with pytest.raises(ValueError, match="no replica groups"):
        hlo.groups("dimensions={0}")


def test_a_compiled_program_has_the_collectives_that_its_sharding_asks_for():
    """Six turns, each a sum over the devices of the products of x's columns with w's rows, f32[4, 16]; whatever else
    the compiler needs, it needs once."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    place = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731

    def turn(x, w):
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, None))), None

    run = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: turn(x, w), x, ws)[0])
    compiled = run.lower(place(P(), 4, 16), place(P(None, "tensor"), 6, 16, 16)).compile()
    found = hlo.traffic(hlo.parse(compiled.as_text()))
    (one,) = [own for own in found.collectives if own.kind == "all-reduce"]
    assert (one.bytes, one.times) == (4 * 16 * 4, 6) and found.unknown == []
    assert {own.times for own in found.collectives if own is not one} <= {1}
    assert sorted(map(sorted, one.groups.tolist())) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_memory_traffic_is_xlas_own_where_there_is_no_loop():
    run = jax.jit(lambda x, w: jnp.sin(x @ w) + 1)
    compiled = run.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 48)))).compile()
    np.testing.assert_allclose(hlo.traffic(hlo.parse(compiled.as_text())).memory,
                               compiled.cost_analysis()["bytes accessed"], rtol=0.02)
