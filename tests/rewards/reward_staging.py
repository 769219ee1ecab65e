"""What tests of rewards share: replies, settings, and a small classifier."""
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from kl_reg import config
from kl_reg.envs.environment import Reply
from kl_reg.types import AGENT

WORDS = ["a", "love", "hate", "nice", "day", "the", "kitchen", "not", "so", "good"]


def reply(text="ok", scored=True, prompt="a prompt", ids=None, episode=0, end=0, **columns):
    """A turn that is scored."""
    return Reply(episode, 1, AGENT, end, [len(text)] if ids is None else ids, text, prompt, True, scored, columns)


def settings(**changes):
    """The configuration with changes to its reward."""
    out = config.default()
    for name, value in changes.items():
        out.reward[name] = value
    return out


def torch_model(seed=5):
    """A random DistilBERT with a context of 40 tokens, whose probabilities spread over 0.3 to 0.7."""
    shapes = transformers.DistilBertConfig(vocab_size=72, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                                           max_position_embeddings=40, id2label={0: "NEGATIVE", 1: "POSITIVE"})
    torch.manual_seed(seed)
    model = transformers.DistilBertForSequenceClassification(shapes).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight + 0.5 * torch.randn_like(weight))
    return model


def save_distilbert(folder):
    """That model and a tokenizer of WORDS."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *WORDS[1:]]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch_model().save_pretrained(folder)
