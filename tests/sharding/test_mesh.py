"""Meshes and partition rules; what cannot be divided is said."""
import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import scenario
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from kl_reg import config as configs
from kl_reg import validation
from kl_reg.models import decoder
from kl_reg.pretrained import quantize
from kl_reg.sharding import constraints, partition_rules
from kl_reg.sharding import mesh as meshes
from kl_reg.training.compile import check_mesh
from tests.programs import by_hand

KEY, TWO_OF_EACH = jax.random.key(0), AbstractMesh((2,) * len(meshes.AXES), meshes.AXES)


def settings(**sizes):
    config = configs.default()
    config.parallel.update(sizes)
    return config


def test_one_axis_takes_what_the_others_leave():
    mesh = meshes.mesh_of(settings(tensor=2, data=-1).parallel)
    assert dict(mesh.shape) == {"member": 1, "data": 4, "fsdp": 1, "tensor": 2, "expert": 1}
    assert sorted(device.id for device in mesh.devices.ravel()) == list(range(8))


def test_neighbours_are_on_the_last_axes():
    """Members are the furthest apart: they never communicate."""
    grid = meshes.grid_of(settings(member=2, data=2, tensor=2).parallel, jax.devices())
    ids = np.vectorize(lambda device: device.id)(grid)
    np.testing.assert_array_equal(ids.reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2))


@pytest.mark.parametrize("sizes, says", [
    ({"data": 3}, "parallel.data=3: there are 8 devices"), ({"data": 4, "tensor": 4}, "parallel.tensor=4"),
    ({"tensor": 3, "data": -1}, "parallel.data=-1, parallel.tensor=3: there are 8"),
    ({"data": 8, "slices": 2}, "parallel.slices=2: the devices are those of 1")])
def test_axes_that_do_not_make_the_devices_are_one_error(sizes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        meshes.mesh_of(settings(**sizes).parallel)


def test_slices_are_joined_along_members_or_else_along_data():
    """Eight devices of two slices, which look like TPU's."""
    devices = [SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 4, platform="cpu", device_kind="cpu")
               for i in range(8)]
    for sizes, axis in (({"member": 2, "data": 4}, 0), ({"data": 4, "tensor": 2}, 1)):
        grid = meshes.grid_of(settings(slices=2, **sizes).parallel, devices)
        slices = np.vectorize(lambda device: device.slice_index)(grid)
        for half in (0, 1):
            assert set(np.split(slices, 2, axis=axis)[half].ravel()) == {half}
    with pytest.raises(ValueError, match="must divide parallel.member=1 or parallel.data=1"):
        meshes.grid_of(settings(slices=2, tensor=8).parallel, devices)


@pytest.mark.parametrize("sizes, says", [
    ({"mode": "vmap"}, "parallel.mode='vmap' is unknown; choose one of 'jit', 'pmap'"),
    ({"fsdp": 0}, "parallel.fsdp=0"),
    ({"data": -1, "fsdp": -1}, "only one axis"), ({"mode": "pmap", "tensor": 2}, "parallel.tensor=2 with"),
    ({"slices": 0}, "parallel.slices=0")])
def test_a_wrong_setting_is_one_error(sizes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        validation.validate(settings(**sizes))


def test_a_mesh_is_no_part_of_an_experiment():
    assert configs.fingerprint(settings(data=4, mode="pmap")) == configs.fingerprint(settings())
    config = settings()
    config.sweep = [{"parallel.data": (1, 2)}]
    with pytest.raises(ValueError, match="parallel.data cannot differ between members"):
        validation.validate(config)


PROGRAM = by_hand(episodes=16, minibatches=2, group=4)


@pytest.mark.parametrize("mode, members, experts, sizes, says", [
    ("jit", 3, 0, {"member": 2, "data": 4}, "parallel.member=2 must divide .* one has 3"),
    ("jit", 1, 0, {"fsdp": 2, "data": 8}, "parallel.fsdp=16 must divide .* they are 8, rl.episodes=16"),
    ("pmap", 1, 0, {"data": 8}, "the 2 episodes of a device must be a multiple of rl.group=4"),
    ("jit", 1, 0, {"expert": 2}, "parallel.expert=2 must divide the model's experts; it has none"),
    ("jit", 1, 6, {"expert": 4}, "it has 6")])
def test_a_program_that_cannot_be_divided_is_one_error(mode, members, experts, sizes, says):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in meshes.AXES), meshes.AXES)
    with pytest.raises(ValueError, match=says):
        check_mesh(PROGRAM, mode, members, experts, mesh)
    check_mesh(PROGRAM, "jit", 4, 8, TWO_OF_EACH)


SWITCHES = {"plain": {}, "gemma": dict(post_norm=True, qk_norm="head", norm="rms_plus_one"), "untied": dict(tied=False),
            "gpt2": dict(rope=None, norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True),
            "mixture": dict(experts=4)}


@pytest.mark.parametrize("switches", SWITCHES)
def test_rules_name_every_parameter_and_divide_every_large_one(switches, tiny_shapes):
    """Whatever a decoder may have, in float or int8: each matrix of a layer (256 numbers or more) and each table."""
    config = dataclasses.replace(tiny_shapes, vocab=304, **SWITCHES[switches])
    params = jax.eval_shape(partial(decoder.init, config), KEY)
    for tree in (params, jax.eval_shape(quantize.quantize, params)):
        specs = meshes.specs(tree, partition_rules.DECODER, TWO_OF_EACH)
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(tree),
                                   jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)), strict=True):
            name, used = meshes.name_of(path), [axis for axis in spec if axis]
            assert len(spec) == x.ndim and len(set(used)) == len(used)
            if x.size // (3 if name.startswith("layers") else 1) >= 256:
                assert len(used) >= (1 if name == "positions" else 2), f"{name} {x.shape} {spec}"


def test_what_reads_the_residual_stream_and_what_writes_it_fit_together(tiny_shapes):
    """Of both, the inner dimension lies on "tensor": between them nothing is moved."""
    params = jax.eval_shape(partial(decoder.init, tiny_shapes), KEY)
    layers = meshes.specs(params, partition_rules.DECODER, TWO_OF_EACH)["layers"]
    assert layers["up"]["kernel"] == layers["query"]["kernel"] == P(None, "fsdp", "tensor")
    assert layers["down"]["kernel"] == layers["out"]["kernel"] == P(None, "tensor", "fsdp")


def test_what_the_optimizer_keeps_of_a_mixture_lies_over_its_experts_devices_too(tiny_shapes):
    """Where parameters lie whole over "expert"."""
    params = {"trunk": jax.eval_shape(partial(decoder.init, dataclasses.replace(tiny_shapes, experts=4)), KEY)}
    state = {"params": params, "opt_state": jax.eval_shape(optax.scale_by_adam().init, params)}
    own = meshes.specs(state, partition_rules.STATE, scenario.mesh_of(fsdp=2, tensor=2, expert=2))
    assert own["params"]["trunk"]["layers"]["query"]["kernel"] == P(None, "fsdp", "tensor")
    for moments in own["opt_state"].mu["trunk"], own["opt_state"].nu["trunk"]:
        layers = moments["layers"]
        assert layers["query"]["kernel"] == P(None, ("fsdp", "expert"), "tensor")
        assert layers["out"]["kernel"] == P(None, "tensor", ("fsdp", "expert"))
        assert layers["experts"]["down"] == P(None, "expert", "tensor", "fsdp")
        assert moments["embed"] == P("tensor", ("fsdp", "expert"))


def test_a_linear_actor_is_divided_as_the_unembedding_that_it_is():
    params = {"actor": {"table": np.zeros((300, 20))}}
    state = {"params": params, "opt_state": jax.eval_shape(optax.scale_by_adam().init, params)}
    own = meshes.specs(state, partition_rules.STATE, scenario.mesh_of(fsdp=2, tensor=2, expert=2))
    assert own["params"]["actor"]["table"] == P("tensor", None)
    for moments in own["opt_state"].mu, own["opt_state"].nu:
        assert moments["actor"]["table"] == P(("tensor", "expert"), None)


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="no partition rule names the parameter actor_2/hidden"):
        meshes.specs({"actor_2": {"hidden": np.zeros(3)}}, partition_rules.STATE, None)


def test_a_dimension_that_does_not_divide_stays_whole_and_is_said():
    mesh, params = scenario.mesh_of(tensor=4), {"embed": np.zeros((302, 16)), "norm": {"scale": np.zeros(16)}}
    placed = meshes.put(params, meshes.model_shardings(params, mesh))
    assert placed["embed"].addressable_shards[0].data.shape == (302, 16)
    assert meshes.undivided(params, partition_rules.DECODER, mesh) == [
        "embed: a dimension is not divided, 302 by tensor=4"]


def test_weights_are_read_into_their_shards(tiny_folder):
    from kl_reg.pretrained import weights

    mesh = scenario.mesh_of(fsdp=2, tensor=4)
    whole = weights.load(str(tiny_folder)).params
    params = weights.load(str(tiny_folder), sharding=meshes.sharding_of(mesh)).params
    assert params["layers"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 8, 8)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == meshes.model_shardings(whole, mesh)


def test_without_a_mesh_nothing_is_constrained():
    text = jax.jit(lambda x: constraints.constrain(x, "data")).lower(np.zeros(8)).as_text()
    assert "sharding" not in text and constraints.spread() == 1
