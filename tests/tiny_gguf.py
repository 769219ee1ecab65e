"""A tiny language model as a GGUF file, written with llama.cpp's own package from known float arrays."""
import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 128, 2
HEAD = WIDTH // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["hello there, how are you?", "I am good; it's a nice day!", "12 or 345 of them", "naïve café  yes"] * 20
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
KINDS = {"self_attn.q_proj": Kind.Q4_0, "self_attn.k_proj": Kind.Q4_1, "self_attn.v_proj": Kind.Q5_0,
         "self_attn.o_proj": Kind.Q5_1, "mlp.gate_proj": Kind.F16, "mlp.up_proj": Kind.BF16,
         "mlp.down_proj": Kind.Q8_0, "model.embed_tokens": Kind.Q8_0}       # all others: float32
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def arrays(architecture, vocab, tied=True):
    """Random weights by Hugging Face name."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, WIDTH)
    for i in range(LAYERS):
        layer = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
                 "self_attn.q_proj": (HEADS * HEAD, WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
                 "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD),
                 "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP)}
        if architecture == "qwen3":
            layer |= {"self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if architecture == "qwen2":
            shapes |= {f"model.layers.{i}.self_attn.{p}_proj.bias": layer[f"self_attn.{p}_proj"][:1] for p in "qkv"}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rows_of_llama_cpp(x, heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(file, architecture="llama", tied=True, tokenizer=None, extra=(), **settings):
    """Writes `file`; returns the arrays under their Hugging Face names.

    `settings` go over the architecture's, `extra` are further tensors as (name, bytes, kind), and `tokenizer(writer)`
    writes a tokenizer and returns how many tokens it has.
    """
    writer = gguf.GGUFWriter(file, architecture)
    given = {"block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH, "feed_forward_length": MLP,
             "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 5e4,
             "attention.layer_norm_rms_epsilon": 1e-5}
    given |= {"attention.key_length": HEAD} if architecture == "qwen3" else {}
    for name, value in (given | settings).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{name}", value)
    weights = arrays(architecture, (tokenizer or byte_level)(writer), tied)
    for name, value in weights.items():
        stem, suffix = name.rsplit(".", 1)
        layer, part = stem.split(".", 3)[2:] if ".layers." in stem else (None, stem)
        kind = KINDS.get(part, Kind.F32) if suffix == "weight" else Kind.F32
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            value = rows_of_llama_cpp(value, HEADS if "q_proj" in part else KV_HEADS)
        prefix = f"blk.{layer}." if layer else ""
        writer.add_tensor(f"{prefix}{NAMES[part]}.{suffix}", gguf.quants.quantize(value, kind), raw_dtype=kind)
    for name, value, kind in extra:
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def byte_level(writer, pre="gpt-2", bos=False):
    """A byte-level BPE, trained here; the special tokens come first. `bos` None: the file does not say whether."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if bos is not None:
        writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def sentence_piece(writer, words=None):
    """As Llama 2's: special tokens, all bytes, characters and `words` with falling scores, and no merges."""
    if words is None:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=100, show_progress=False))
        words = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
    writer.add_token_scores([0.0] * 259 + [float(-i) for i in range(len(words))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)
