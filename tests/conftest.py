"""Strict settings for every test, and the small models and settings that tests share."""
import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("KL_REG_TESTS_ON", "cpu")      # benchmarks/gpu.sh runs some on a GPU
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"     # shapes are tiny: it is compilation that tests wait for
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("kl_reg", "beartype.beartype")    # shapes and dtypes of public signatures are checked

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from kl_reg.models import decoder, layers  # noqa: E402
from kl_reg.pretrained import chitchat, families, tokenizer, weights  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny_shapes():
    """A decoder small enough to compile in a second."""
    return decoder.DecoderConfig(vocab=300, width=16, layers=3, heads=4, kv_heads=2, head_width=8, mlp_width=32,
                                 max_position=64, rope=layers.Rope(10000.0, 8))


@pytest.fixture(scope="session")
def tiny_params(tiny_shapes):
    """Random parameters, scaled up from their initial size."""
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, decoder.init(tiny_shapes, jax.random.key(0)))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer of 300 tokens, with the speakers' prefixes as tokens."""
    texts = [chitchat.transcript([f"hello there, how are you {i}?", "I am good, it is a nice day!"]) for i in range(50)]
    trained = tokenizer.train(texts, 300, chitchat.SPEAKERS)
    assert trained.get_vocab_size() <= 300
    return trained


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_shapes, tiny_params, tiny_tokenizer):
    """That model and that tokenizer as a folder; the model likes to end its turns, so that replies get finished."""
    folder = tmp_path_factory.mktemp("tiny")
    (end,) = tokenizer.encode(tiny_tokenizer, chitchat.END)
    params = tiny_params | {"embed": tiny_params["embed"].at[end].multiply(8.0)}
    weights.save(folder, families.llama_settings(tiny_shapes), params)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    return folder
