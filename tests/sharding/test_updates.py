"""One device, and every way to divide a program: the same tokens, losses, gradients and parameters."""
import jax
import numpy as np
import pytest
import scenario

from kl_reg.sharding import constraints
from kl_reg.sharding import mesh as meshes
from kl_reg.training.compile import compile_program

WAYS = {
    "data": ("full", {"data": 8}, "jit", {"layers/query/kernel": (1, 1, 16, 32)}),
    "fsdp": ("full", {"fsdp": 8}, "jit", {"layers/query/kernel": (1, 1, 2, 32), "layers/down/kernel": (1, 1, 32, 2)}),
    "tensor": ("full", {"data": 2, "fsdp": 2, "tensor": 2}, "jit", {
        "layers/query/kernel": (1, 1, 8, 16), "layers/down/kernel": (1, 1, 16, 8), "trunk/embed": (1, 150, 8)}),
    "pmap": ("full", {"data": 4}, "pmap", {"layers/query/kernel": (1, 1, 16, 32)}),
    "expert": ("mixture", {"data": 2, "expert": 4}, "jit", {
        "experts/gate": (1, 1, 1, 16, 32), "experts/down": (1, 1, 1, 32, 16), "router/kernel": (1, 1, 16, 4)}),
    "a ledger, pmap": ("budget", {"data": 4}, "pmap", {"actor/hidden/kernel": (1, 19, 8)}),
    "a linear actor": ("linear", {"data": 2, "tensor": 4}, "jit", {"actor/table": (1, 75, 20)}),
}
"""Program, sizes of axes, mode, and what each device then holds of parameters of one member."""


@pytest.mark.parametrize("way", WAYS)
def test_three_updates_are_those_of_one_device(way, alone):
    kind, sizes, mode, shapes = WAYS[way]
    own, episodes, expected = alone(kind)
    assert len(set(episodes.mask.sum(-1).ravel())) > 1, "episodes of one length hide how means are taken"
    assert np.abs(expected[0].params["scalars"]["value"]["kernel"] - own.params["scalars"]["value"]["kernel"]).max() > 0
    mesh = scenario.mesh_of(**sizes)
    got, state = scenario.updates(own, episodes, mesh, mode)
    scenario.assert_same_updates(got, expected)
    held = {jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.shape
            for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))}
    for name, shape in shapes.items():
        found = [own for path, own in held.items() if path.endswith(name)]
        assert len(found) == 2 and set(found) == {shape}, f"{name}, of parameters and optimizer: {found}"


@pytest.mark.parametrize("way", WAYS)
def test_sampled_tokens_are_those_of_one_device(way, alone):
    kind, sizes, mode, _ = WAYS[way]
    own, expected, _ = alone(kind)
    mesh = scenario.mesh_of(**sizes)
    got = scenario.sample(own, mesh, mode)
    np.testing.assert_array_equal(got.transcript.tokens, expected.transcript.tokens)
    devices = sizes.get("data", 1) * sizes.get("fsdp", 1)
    assert {x.addressable_shards[0].data.shape[1] for x in jax.tree.leaves(got)} == {scenario.EPISODES // devices}


@pytest.mark.parametrize(("kind", "name", "shape", "tolerance"), [
    ("full", "trunk/layers/query/kernel", (1, 1, 16, 16), 1e-5),
    ("lora", "adapter/query/b", (1, 1, 8, 16), 3e-5)])     # its gradient is small beside what it is a sum of
def test_members_over_devices_are_solo_runs(tiny_folder, prompts, kind, name, shape, tolerance):
    """Two members that differ in seed and price, one on each half of the devices."""
    both = scenario.case(str(tiny_folder), prompts, kind, members=2)
    mesh = scenario.mesh_of(member=2, tensor=2)
    episodes = scenario.sample(both, mesh)
    assert {x.addressable_shards[0].data.shape[0] for x in jax.tree.leaves(episodes)} == {1}
    recorded = jax.device_get(episodes)
    got, state = scenario.updates(both, recorded, mesh)
    (held,) = [x for path, x in jax.tree_util.tree_leaves_with_path(state.params) if meshes.name_of(path) == name]
    assert held.addressable_shards[0].data.shape == shape
    assert not np.array_equal(recorded.transcript.tokens[0], recorded.transcript.tokens[1])
    for i in range(2):
        one = slice(i, i + 1)
        solo = both._replace(hyper=jax.tree.map(lambda x, one=one: x[one], both.hyper), seeds=both.seeds[one],
                             params=jax.tree.map(lambda x, one=one: x[one], both.params))
        sampled = jax.device_get(scenario.sample(solo))
        np.testing.assert_array_equal(sampled.transcript.tokens[0], recorded.transcript.tokens[i])
        expected, _ = scenario.updates(solo, sampled)
        own = [jax.tree.map(lambda x, one=one: x[one], update) for update in got]
        scenario.assert_same_updates(own, expected, tolerance)


def test_devices_that_do_not_share_their_sums_are_found_out(alone, monkeypatch):
    """Each device by itself: means of its own episodes, whose lengths differ."""
    own, episodes, expected = alone("full")
    monkeypatch.setattr(constraints, "total", lambda tree, axis: tree)
    own = own._replace(program=own.program._replace())      # compiled by itself
    got, _ = scenario.updates(own, episodes, scenario.mesh_of(data=4), "pmap")
    with pytest.raises(AssertionError, match="policy/entropy_avg|loss|val/"):
        scenario.assert_same_updates(got, expected)


def test_one_device_has_no_mesh(alone):
    """The default compiles what it compiled before there were meshes: no sharding is in it."""
    own, episodes, _ = alone("full")
    run, state, hyper, frozen = scenario.placed(own, None, "jit")
    text = compile_program(own.program).update.lower(state, hyper, frozen, episodes,
                                                              scenario.rewards_of(episodes)).as_text()
    assert "sharding" not in text and "all_reduce" not in text
