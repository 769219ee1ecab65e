import json

import jax
import jax.numpy as jnp
import pytest

from kl_reg.config import default
from kl_reg.models import decoder
from kl_reg.planning import abstract
from kl_reg.pretrained import families, weights
from kl_reg.training import member_groups

SHAPES = dict(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=24, max_position_embeddings=128)


@pytest.fixture
def config(tiny_folder):
    config = default()
    config.model.path, config.policy.hidden = str(tiny_folder), 4
    config.env.opening, config.env.length, config.rl.episodes = "<|start|>A: hi\n", 12, 4
    config.policy.layers = 1
    config.sweep = [{"kl.coef": (0.1, 0.3)}, {"kl.budget": (2.0,)}]
    return config


@pytest.fixture
def bare(tmp_path):
    """A folder that holds nothing but a Mixtral's config.json."""
    folder = tmp_path / "bare"
    folder.mkdir()
    settings = SHAPES | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("kind", ["head", "lora", "full"])
def test_shapes_are_those_of_training(config, kind, tmp_path):
    config.policy.kind = kind
    if kind != "head":
        config.sweep = config.sweep[:1]
    found = abstract.programs(config, tmp_path)
    groups = member_groups.plan(config, weights.load(config.model.path, config.model.dtype))
    assert [own.members for own in found] == [group.members for group in groups] == [[0, 1], [2]][:len(groups)]
    for own, group in zip(found, groups, strict=True):
        assert shapes(own.frozen) == shapes(group.frozen) and shapes(own.hyper) == shapes(group.hyper)
        assert shapes(own.state) == shapes(jax.eval_shape(group.run.init, group.frozen.base, group.seeds, group.hyper))
        openings = [built.program.task.env.openings.tokens.shape for built in (own, group)]
        assert openings[0] == openings[1] and own.guessed == 0


def test_config_json_alone_is_enough(config, bare, tmp_path):
    config.model.path, config.env.opening_tokens, config.env.opening = str(bare), 7, "so long that 7 are too few"
    config.sweep = config.sweep[:1]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    own = abstract.programs(config, scratch)[0]
    assert own.shapes.experts == 4 and own.guessed == 7
    execution = own.program.execution
    assert execution.chunk == config.rl.entries and execution.block is None             # not as on this machine's CPU
    assert own.stream.episodes.transcript.tokens.shape == (2, 4, 7 + 12)
    wanted = jax.eval_shape(lambda: decoder.init(families.read(json.loads((bare / "config.json").read_text()))[0],
                                                 jax.random.key(0)))
    assert shapes(own.frozen.base) == shapes(wanted)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves((own.frozen, own.state, own.stream)))


def test_operations_of_a_rollout_by_hand(config, bare, tmp_path):
    """Of each of 12 tokens of 4 episodes of 2 members, in 2 layers: query, key, value and out; a router and two experts
    of three matrices; scores and weighted values of 6 read and 12 new slots. Then logits of base and change together;
    the actor, and value and budget neuron of as many hidden units; two rotary angles. The opening's 6 tokens are read
    once for both members."""
    config.model.path, config.env.opening_tokens, config.sweep = str(bare), 7, config.sweep[:1]
    (tmp_path / "scratch").mkdir()
    own = abstract.programs(config, tmp_path / "scratch")[0]
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 16 * 4 + 2 * 3 * 16 * 24
    head = (16 + 3) * 4 * 3 + 4 * 16 + 4 * 2
    token = 2 * (layer + 2 * 16 * (6 + 12)) + 320 * 16 + head + 2
    opening = 2 * (layer + 2 * 16 * 6) + 2
    assert own.flops["rollout"] == 2 * (2 * 4 * 12 * token + 6 * opening)


def test_published_models_have_their_published_sizes(config, tmp_path):
    """46.7 and 8.03 billion parameters: Jiang et al. (2024); Grattafiori et al. (2024)."""
    for name, size in (("mistralai/Mixtral-8x7B-v0.1", 46.7e9), ("meta-llama/Llama-3.1-8B", 8.03e9)):
        model, _ = families.read(json.loads(abstract.PUBLISHED.read_text())[name]["config"])
        leaves = jax.tree.leaves(jax.eval_shape(lambda model=model: decoder.init(model, jax.random.key(0))))
        assert sum(x.size for x in leaves) == pytest.approx(size, rel=1e-3)


def test_int8_and_bfloat16_weights_are_counted_as_such(config, bare, tmp_path):
    config.model.path, config.model.dtype, config.model.quantize = str(bare), "bfloat16", "int8"
    config.sweep = []
    (tmp_path / "scratch").mkdir()
    base = abstract.programs(config, tmp_path / "scratch")[0].frozen.base
    assert base["layers"]["experts"]["gate"].dtype == jnp.int8 and base["embed"].dtype == jnp.bfloat16


def test_a_model_that_is_nowhere_is_one_clear_error(config, tmp_path):
    config.model.path = "no/folder/here"
    with pytest.raises(FileNotFoundError, match="model.path='no/folder/here': no such folder; a plan needs one"):
        abstract.programs(config, tmp_path)
