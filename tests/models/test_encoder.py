"""Classifiers against torch's DistilBERT, BERT and RoBERTa, and what is said of one that is none."""
import json
import shutil
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from kl_reg.models import encoder
from kl_reg.pretrained.encoder_families import load, load_config

WORDS = ["i", "love", "this", "it", "is", "wonderful", "what", "a", "terrible", "day"]
TEXTS = ["", "lovely", "What a terrible day", "is it the kitchen, there?!", "thou art"]
SHAPES = dict(vocab_size=96, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
NAMES = ("distilbert", "bert", "roberta", "xlm-roberta")


class Pair(NamedTuple):
    """Torch's model, and the folder it is saved in with its tokenizer."""

    torch: torch.nn.Module
    folder: object


def word_pieces():
    """As BERT's: whole words, and letters for others. (Trainers break ties at random.)"""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *",.!?", *WORDS]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_pairs():
    """As RoBERTa's, with three merges."""
    letters = ["Ġ", ",", ".", "!", "?", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "th", "the", "Ġthe"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [("t", "h"), ("th", "e"), ("Ġ", "the")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def torch_model(name):
    """Every weight is random, norms included, and every setting that matters is unlike its default."""
    settings = {
        "distilbert": dict(vocab_size=96, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=32),
        "bert": dict(**SHAPES, max_position_embeddings=32, layer_norm_eps=1e-3, num_labels=3, hidden_act="gelu_new"),
        "roberta": dict(**SHAPES, max_position_embeddings=34, type_vocab_size=1, num_labels=1),
        "xlm-roberta": dict(**SHAPES, max_position_embeddings=34, problem_type="multi_label_classification")}
    config = transformers.AutoConfig.for_model(name, **settings[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        weight.copy_(0.5 * torch.randn_like(weight) + (weight.ndim == 1 and "orm.weight" in key))
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By `model_type`."""
    out = {}
    for name in NAMES:
        folder, model = tmp_path_factory.mktemp(name), torch_model(name)
        model.save_pretrained(folder)
        (byte_pairs() if "roberta" in name else word_pieces()).save(str(folder / "tokenizer.json"))
        out[name] = Pair(model, folder)
    return out


@pytest.fixture
def copy(pairs, tmp_path):
    """A folder of that family, to be changed."""
    return lambda name: shutil.copytree(pairs[name].folder, tmp_path / name)


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rewrite(folder, change):
    """Passes the weights of a folder through `change`."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


forward = jax.jit(encoder.forward, static_argnums=0)


def batch(rows, width, fill):
    """Rows of token ids as one right-padded array, what stands behind them drawn at random; and their lengths."""
    tokens = np.random.default_rng(fill).integers(0, 96, (len(rows), width)).astype(np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    return jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32)


def theirs(pair, texts):
    """Torch's logits, each text alone and by transformers' own reader of the tokenizer."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(pair.folder / "tokenizer.json"))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return np.concatenate([pair.torch(torch.tensor([row])).logits.numpy() for row in ids])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_torch_whatever_stands_in_the_batch(pairs, name):
    model = load(str(pairs[name].folder))
    rows = [encoding.ids for encoding in model.tokenizer.encode_batch(TEXTS)]
    assert len({len(row) for row in rows}) == len(TEXTS)
    expected = theirs(pairs[name], TEXTS)
    assert expected.std(0).min() > 0.1                      # so the tolerance means something
    first, other = (forward(model.config, model.params, *batch(rows, 32, fill)) for fill in (0, 1))
    np.testing.assert_allclose(first, expected, atol=1e-5)
    np.testing.assert_array_equal(first, other)             # what stands behind a text is never looked at
    swapped = forward(model.config, model.params, *batch([rows[2]] * 4 + [rows[0]], 32, 0))
    np.testing.assert_allclose(swapped, expected[[2, 2, 2, 2, 0]], atol=1e-5)


@pytest.mark.parametrize(("name", "function"), [
    ("distilbert", partial(torch.softmax, dim=-1)), ("bert", partial(torch.softmax, dim=-1)),
    ("roberta", lambda logits: logits), ("xlm-roberta", torch.sigmoid)])
def test_probabilities_are_what_the_kind_of_problem_makes_of_the_logits(pairs, name, function):
    config = load_config(str(pairs[name].folder))
    logits = np.random.default_rng(0).normal(size=(4, len(config.labels))).astype(np.float32)
    expected = function(torch.tensor(logits)).numpy()
    np.testing.assert_allclose(encoder.probabilities(config, jnp.asarray(logits)), expected, rtol=1e-5)


def test_a_text_is_cut_to_the_context_and_keeps_its_end(pairs):
    for name in NAMES:
        tokenizer = load(str(pairs[name].folder)).tokenizer
        ends = tokenizer.encode("").ids
        long = tokenizer.encode(" ".join(WORDS * 5)).ids
        assert len(long) == 32
        assert [long[0], long[-1]] == ends


def test_settings_are_read_from_config_json(pairs, copy):
    assert load_config(str(pairs["bert"].folder), "bfloat16") == encoder.EncoderConfig(
        vocab=96, width=16, layers=2, heads=4, mlp_width=24, positions=32, labels=("LABEL_0", "LABEL_1", "LABEL_2"),
        problem="single_label_classification", pool="tanh", offset=0, token_types=2, activation="gelu_new",
        norm_eps=1e-3, dtype="bfloat16")
    roberta = load_config(str(pairs["roberta"].folder))
    assert (roberta.offset, roberta.max_length, roberta.token_types, roberta.problem) == (2, 32, 1, "regression")
    folder = copy("distilbert")
    change(folder, id2label={"1": "POSITIVE", "0": "NEGATIVE"})
    assert load_config(str(folder)).labels == ("NEGATIVE", "POSITIVE")


def test_bfloat16_parameters_give_about_the_same(pairs):
    model = load(str(pairs["distilbert"].folder), "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    rows = [encoding.ids for encoding in model.tokenizer.encode_batch(TEXTS)]
    ours = forward(model.config, model.params, *batch(rows, 32, 0))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs(pairs["distilbert"], TEXTS), atol=0.1)


def old_bert(tensors):
    """As files of 2019 name them, with buffers and the heads of pretraining."""
    names = {key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
             for key in tensors}
    return {names[key]: tensors[key] for key in tensors} | {
        "bert.embeddings.position_ids": np.arange(32)[None], "cls.seq_relationship.bias": np.zeros(2, np.float32)}


def without(prefix):
    return lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()}


def with_a_pooler(tensors):
    return tensors | {"roberta.pooler.dense.weight": np.zeros((16, 16), np.float32)}


@pytest.mark.parametrize(("name", "spelling"), [
    ("bert", old_bert), ("bert", without("bert.")), ("distilbert", without("distilbert.")),
    ("roberta", without("roberta.")), ("roberta", with_a_pooler)])
def test_other_spellings_of_a_checkpoint_are_the_same_model(pairs, copy, name, spelling):
    folder = copy(name)
    rewrite(folder, spelling)
    for ours, same in zip(*(jax.tree.leaves(load(str(x)).params) for x in (folder, pairs[name].folder)), strict=True):
        np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize("name", ["distilbert", "bert", "roberta"])
def test_a_model_without_a_head_says_so(copy, name):
    folder = copy(name)
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if key.startswith(f"{name}.")})
    with pytest.raises(ValueError, match="no sequence classification head") as error:
        load(str(folder))
    assert str(folder / "model.safetensors") in str(error.value)


def test_missing_extra_and_misshapen_weights_are_all_listed(copy):
    folder = copy("distilbert")
    head = {"distilbert.new.weight": np.zeros(2, np.float32), "classifier.bias": np.zeros(3, np.float32)}
    rewrite(folder, lambda tensors: {key: x for key, x in tensors.items() if key != "pre_classifier.bias"} | head)
    with pytest.raises(ValueError) as error:
        load(str(folder))
    for part in ("missing pre_classifier.bias", "extra distilbert.new.weight",
                 "classifier.bias is (3,), expected (2,)"):
        assert part in str(error.value)
    assert str(error.value).count(";") == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "llama"}, "'llama'.*bert, distilbert"), ({"activation": "mish"}, "activation 'mish'.*gelu"),
    ({"problem_type": "ranking"}, "problem_type 'ranking'.*regression"), ({"dim": "wide"}, "dim"),
    ({"id2label": {"1": "A", "2": "B"}}, "id2label numbers its labels 1, 2"),
    ({"position_embedding_type": "relative_key"}, "'relative_key'.*absolute")])
def test_a_setting_that_is_not_supported_is_refused_with_the_file(copy, settings, message):
    folder = copy("distilbert")
    change(folder, **settings)
    with pytest.raises(ValueError, match=message) as error:
        load_config(str(folder))
    assert str(folder / "config.json") in str(error.value)


def test_an_activation_has_the_name_that_the_family_gives_it(copy):
    folder = copy("bert")
    change(folder, hidden_act="mish")
    with pytest.raises(ValueError, match="hidden_act 'mish' is not supported; known: .*gelu"):
        load_config(str(folder))


def test_a_tokenizer_that_does_not_fit_is_refused(copy):
    folder = copy("bert")
    tokenizer = word_pieces()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="adds no special token"):
        load(str(folder))
    tokenizer = word_pieces()
    tokenizer.add_tokens([f"new{i}" for i in range(96)])        # unused, so that no embedding is needed
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load(str(folder)).config.vocab == 96
    tokenizer.post_processor = processors.BertProcessing(("new95", tokenizer.token_to_id("new95")), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="adds to a text: token .*'new95'.* no embedding .* 96 rows"):
        load(str(folder))
