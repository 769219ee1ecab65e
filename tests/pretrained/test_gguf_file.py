"""GGUF files against transformers' own loader, llama.cpp's formulas by hand, and damaged ones."""
import functools
import unicodedata

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_reg.pretrained import gguf_file
from tests import tiny_gguf

# Half a step of the coarsest kind used, 4 bits between -4 and 4 standard deviations, and rounding.
COARSE = 0.5
PIECES = [*"aehorst ,'12\n", "  ", "caf\u00e9", "\u65e5"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny Llama's file and the weights it was made of."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, tiny_gguf.write(file)


@pytest.mark.parametrize("architecture, tied", [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_weights_and_config_are_those_of_transformers(tmp_path, architecture, tied):
    written = tiny_gguf.write(tmp_path / "tiny.gguf", architecture, tied)
    source, config = gguf_file.source(tmp_path / "tiny.gguf"), gguf_file.settings(tmp_path / "tiny.gguf")
    ignored = {"head_dim": tiny_gguf.HEAD} if architecture == "qwen3" else {}      # by transformers, in the file
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32,
                                                              **ignored)
    theirs = {name: value.numpy() for name, value in model.state_dict().items()
              if name != "lm_head.weight" or not tied}
    assert source.path == tmp_path / "tiny.gguf" and set(source.shapes) == set(theirs) == set(written)
    for name, value in theirs.items():
        ours = source.read(name)
        assert ours.dtype == np.float32 and source.shapes[name] == ours.shape
        np.testing.assert_array_equal(ours, value)
        np.testing.assert_allclose(ours, written[name], atol=COARSE)
    rebuilt = transformers.AutoConfig.for_model(**config)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "intermediate_size", "max_position_embeddings", "rope_parameters", "hidden_act", "tie_word_embeddings",
                 "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(rebuilt, name) == getattr(model.config, name), name
    assert rebuilt.rms_norm_eps == 1e-5 and rebuilt.head_dim == tiny_gguf.HEAD
    assert rebuilt.architectures == [type(model).__name__]


def test_the_rows_of_a_head_are_put_back(tmp_path):
    # llama.cpp stores row j of a head's first half at 2j, of its second at 2j + 1.
    stored = np.float32([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
    both = np.concatenate([stored, 16 + stored])
    tiny_gguf.write(tmp_path / "a.gguf", extra=[("blk.2.attn_k.weight", both[:, None], Kind.F32),
                                                ("blk.2.attn_k.bias", both, Kind.F32),
                                                ("blk.2.attn_v.weight", both[:, None], Kind.F32)])
    source = gguf_file.source(tmp_path / "a.gguf")
    assert source.read("model.layers.2.self_attn.k_proj.weight")[:, 0].tolist() == list(range(32))
    assert source.read("model.layers.2.self_attn.k_proj.bias").tolist() == list(range(32))
    assert source.read("model.layers.2.self_attn.v_proj.weight")[:, 0].tolist() == both.tolist()


def test_a_block_of_q4_k_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    scales, nibbles = rng.integers(0, 256, 12, np.uint8), rng.integers(0, 256, (4, 32), np.uint8)
    block = np.concatenate([np.float16([0.5, 0.25]).view(np.uint8), scales, nibbles.reshape(-1)])[None]
    s, expected = scales.astype(int), []
    for j in range(8):      # get_scale_min_k4 of ggml-quants.c
        scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4
        low = s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4
        expected += [0.5 * scale * q - 0.25 * low for q in (nibbles[j // 2] >> 4 * (j % 2) & 15).tolist()]
    tiny_gguf.write(tmp_path / "a.gguf", extra=[("blk.2.ffn_up.weight", block, Kind.Q4_K)])
    source = gguf_file.source(tmp_path / "a.gguf")
    assert source.shapes["model.layers.2.mlp.up_proj.weight"] == (1, 256)
    assert source.read("model.layers.2.mlp.up_proj.weight").tolist() == [expected]


def test_every_kind_of_block_is_read_or_refused(tmp_path):
    rows = {kind: np.zeros((2, 256 // block * size), np.uint8) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}
    tiny_gguf.write(tmp_path / "a.gguf", extra=[(f"blk.{10 + kind}.ffn_up.weight", row, kind)
                                                for kind, row in rows.items()])
    source, refused = gguf_file.source(tmp_path / "a.gguf"), set()
    for kind in rows:
        try:
            assert source.read(f"model.layers.{10 + kind}.mlp.up_proj.weight").shape == (2, 256)
        except ValueError as error:
            assert f"a.gguf: blk.{10 + kind}.ffn_up.weight" in str(error) and kind.name in str(error)
            refused.add(kind.name)
    assert not refused & {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                          "Q6_K", "IQ4_NL", "IQ4_XS"}


def test_the_scaling_of_llama_3_is_recognised(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    slowed, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    divisors = (5e5 ** -(np.arange(0, 128, 2) / 128) / slowed.numpy()).astype(np.float32)
    assert divisors[0] == 1 and divisors[-1] == 32 and ((divisors > 2) & (divisors < 30)).any()
    sizes = {"embedding_length": 256, "attention.head_count": 2, "rope.freq_base": 5e5}
    tiny_gguf.write(tmp_path / "a.gguf", extra=[("rope_freqs.weight", divisors, Kind.F32)], **sizes)
    assert gguf_file.settings(tmp_path / "a.gguf")["rope_parameters"] == rope | {"factor": pytest.approx(32.0)}
    assert "rope_freqs.weight" not in gguf_file.source(tmp_path / "a.gguf").shapes
    tiny_gguf.write(tmp_path / "b.gguf", extra=[("rope_freqs.weight", divisors ** 2, Kind.F32)], **sizes)
    with pytest.raises(ValueError, match=r"b.gguf: rope_freqs.weight is not the scaling of Llama 3"):
        gguf_file.settings(tmp_path / "b.gguf")


@pytest.mark.parametrize("setting, says", [
    ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"), ({"expert_count": 8}, "llama.expert_count=8"),
    ({"rope.dimension_count": 8}, "llama.rope.dimension_count=8"), ({"block_count": "2"}, "llama.block_count is '2'"),
    ({"rope.scaling.factor": 4.0}, "llama.rope.scaling.factor=4.0"), ({"logit_scale": 2.0}, "llama.logit_scale=2.0"),
    ({"attention.sliding_window": 8}, "llama.attention.sliding_window=8"),
    ({"attention.head_count": 0}, "llama.attention.head_count is 0")])
def test_a_setting_that_is_not_supported_is_named(tmp_path, setting, says):
    tiny_gguf.write(tmp_path / "a.gguf", **setting)
    with pytest.raises(ValueError, match=r"a\.gguf: ") as error:
        gguf_file.settings(tmp_path / "a.gguf")
    assert says in str(error.value)


def test_another_architecture_lists_the_known(tmp_path):
    tiny_gguf.write(tmp_path / "a.gguf", "falcon")
    for read in (gguf_file.settings, gguf_file.source):
        with pytest.raises(ValueError, match=r"a\.gguf: architecture 'falcon' .*docs/models.md.*llama, qwen2, qwen3"):
            read(tmp_path / "a.gguf")


def test_weights_without_a_name_are_all_listed(tmp_path):
    tiny_gguf.write(tmp_path / "a.gguf", extra=[("blk.0.ffn_gate_exps.weight", np.zeros(4, np.float32), Kind.F32),
                                                ("cls.output.weight", np.zeros(4, np.float32), Kind.F32)])
    with pytest.raises(ValueError, match=r"a\.gguf: llama has no .*blk.0.ffn_gate_exps.weight, cls.output.weight"):
        gguf_file.source(tmp_path / "a.gguf")


@pytest.mark.parametrize("pre, bos, first", [("gpt-2", False, None), ("llama-bpe", True, "<|im_start|>"),
                                             ("qwen2", False, None), ("sentence_piece", None, "<s>")])
def test_the_tokenizer_is_that_of_transformers(tmp_path, pre, bos, first):
    kind = (tiny_gguf.sentence_piece if pre == "sentence_piece" else
            functools.partial(tiny_gguf.byte_level, pre=pre, bos=bos))
    tiny_gguf.write(tmp_path / "a.gguf", tokenizer=kind)
    ours = gguf_file.tokenizer(tmp_path / "a.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf").backend_tokenizer
    assert ours.get_vocab() == theirs.get_vocab()

    @settings(max_examples=100)
    @given(st.lists(st.sampled_from([*PIECES, *tiny_gguf.SPECIAL, *tiny_gguf.TEXTS[:4]])))
    def check(parts):
        text = unicodedata.normalize("NFC", "".join(parts))     # transformers forgets that Qwen2's tokenizer does this
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)

    check()
    plain = ours.encode("hello you", add_special_tokens=False).tokens
    assert ours.encode("hello you").tokens == ([first] if first else []) + plain


@pytest.mark.parametrize("pre, bos, first", [("llama-bpe", None, True), ("llama-bpe", False, False),
                                             ("smollm", None, False), ("qwen2", None, False), ("qwen2", True, True)])
def test_a_file_that_does_not_say_has_the_bos_that_llama_cpp_gives_it(tmp_path, pre, bos, first):
    """llama_vocab::impl::load: `add_bos = true` of SPM and of Llama 3's pre-tokenizer alone."""
    tiny_gguf.write(tmp_path / "a.gguf", tokenizer=functools.partial(tiny_gguf.byte_level, pre=pre, bos=bos))
    assert (gguf_file.tokenizer(tmp_path / "a.gguf").encode("hello").tokens[0] == "<|im_start|>") == first


def test_text_is_split_as_llama_cpp_and_the_models_own_tokenizers_do(tmp_path):
    text, split = "cafe\u0301  12", {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        tiny_gguf.write(tmp_path / "a.gguf", tokenizer=functools.partial(tiny_gguf.byte_level, pre=pre))
        tokenizer = gguf_file.tokenizer(tmp_path / "a.gguf")
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        pieces = [normal[slice(*place)] for _, place in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
        split[pre] = pieces
    assert split == {"gpt-2": ["cafe", "\u0301", " ", " 12"], "smollm": ["cafe", "\u0301", "  ", "1", "2"],
                     "llama-bpe": ["cafe", "\u0301", " ", " ", "12"], "qwen2": ["caf\u00e9", " ", " ", "1", "2"]}


@pytest.mark.parametrize("words, pieces", [(["ab", "bc"], ["ab", "c"]), (["bc", "ab"], ["a", "bc"])])
def test_the_merge_with_the_higher_score_goes_first(tmp_path, words, pieces):
    letters = ["\u2581", "a", "b", "c"]
    tiny_gguf.write(tmp_path / "a.gguf", tokenizer=lambda writer: tiny_gguf.sentence_piece(writer, words + letters))
    tokenizer = gguf_file.tokenizer(tmp_path / "a.gguf")
    assert tokenizer.encode("abc").tokens == ["<s>", "\u2581", *pieces]


def test_special_tokens_and_template(tiny):
    file, _ = tiny
    config = gguf_file.tokenizer_config(file)
    assert {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")} == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
        "chat_template": tiny_gguf.TEMPLATE}


def test_an_unknown_split_lists_the_known(tmp_path):
    tiny_gguf.write(tmp_path / "a.gguf", tokenizer=functools.partial(tiny_gguf.byte_level, pre="dbrx"))
    with pytest.raises(ValueError, match=r"a\.gguf: .*'dbrx'.*gpt-2.*smollm"):
        gguf_file.tokenizer(tmp_path / "a.gguf")


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(tiny, part):
    file, _ = tiny
    short = file.with_name("short.gguf")
    short.write_bytes(file.read_bytes()[:int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"short\.gguf cannot be read as GGUF"):
        gguf_file.source(short)


def test_a_file_without_its_last_weights_is_named(tiny):
    file, _ = tiny
    short = file.with_name("shorter.gguf")
    short.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shorter\.gguf cannot be read as GGUF: a tensor ends .* after the file"):
        gguf_file.source(short)


@given(st.data())
def test_a_damaged_header_is_one_error_if_any(tiny, data):
    file, _ = tiny
    content, damaged = bytearray(file.read_bytes()), file.with_name("damaged.gguf")
    at = data.draw(st.integers(0, 12_000))
    size = data.draw(st.integers(1, 8))
    content[at:at + size] = data.draw(st.binary(min_size=size, max_size=size))
    damaged.write_bytes(content)
    for read in (gguf_file.source, gguf_file.settings, gguf_file.tokenizer, gguf_file.tokenizer_config):
        try:
            read(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)


def test_what_is_no_gguf_file_is_named(tmp_path):
    file = tmp_path / "a.gguf"
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\0\0\0\0\0\0\0{}      "):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.gguf cannot be read as GGUF"):
            gguf_file.source(file)
