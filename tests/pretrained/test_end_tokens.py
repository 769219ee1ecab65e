"""Which tokens end a model's text: by hand from the files that name them, and as transformers reads these."""
import json

import pytest
import transformers
from tokenizers import Tokenizer, models

from kl_reg.pretrained import end_tokens

WORDS = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["a", "</s>", "<end>", "<turn>", "b"])}))
CONFIG, GENERATION, OF_TOKENIZER, MAP = ("config.json", "generation_config.json", "tokenizer_config.json",
                                         "special_tokens_map.json")


def named(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return end_tokens.named(folder, WORDS)


@pytest.mark.parametrize(("files", "expected"), [
    ({CONFIG: {"eos_token_id": 1}}, {1: [CONFIG]}),
    ({CONFIG: {}, GENERATION: {"eos_token_id": [2, 3]}}, {2: [GENERATION], 3: [GENERATION]}),
    ({CONFIG: {"eos_token_id": 1}, GENERATION: {"eos_token_id": [3, 1]}}, {1: [CONFIG, GENERATION], 3: [GENERATION]}),
    ({CONFIG: {}, OF_TOKENIZER: {"eos_token": "<end>"}}, {2: [OF_TOKENIZER]}),
    ({CONFIG: {"eos_token_id": 1}, OF_TOKENIZER: {"eos_token": {"content": "<turn>", "special": True}}},
     {1: [CONFIG], 3: [OF_TOKENIZER]}),
    ({CONFIG: {"text_config": {"eos_token_id": [1]}, "eos_token_id": None}}, {1: [CONFIG]}),
    ({CONFIG: {"text_config": {"eos_token_id": 1}, "eos_token_id": 1}}, {1: [CONFIG]}),
    ({CONFIG: {"text_config": None}, MAP: {"eos_token": "<end>"}}, {2: [MAP]}),
    ({CONFIG: {}, OF_TOKENIZER: {"eos_token": None}}, {}),
    ({CONFIG: {}, OF_TOKENIZER: {"eos_token": "no token"}}, {}), ({CONFIG: {}}, {}), ({}, {})])
def test_it_is_the_union_and_says_who_names_each(tmp_path, files, expected):
    assert named(tmp_path, files) == expected


def test_a_line_says_which(tmp_path):
    found = named(tmp_path, {CONFIG: {"eos_token_id": 1}, OF_TOKENIZER: {"eos_token": "</s>"},
                             GENERATION: {"eos_token_id": 7}})
    assert end_tokens.describe(found, WORDS) == (
        "1 '</s>' (config.json, tokenizer_config.json), 7 None (generation_config.json)")


@pytest.mark.parametrize(("name", "content", "problem"), [
    (CONFIG, {"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a number or a list of numbers"),
    (GENERATION, {"eos_token_id": [1, True]}, "eos_token_id=.1, True. must be"), (OF_TOKENIZER, "{", "is no JSON"),
    (OF_TOKENIZER, {"eos_token": 3}, "eos_token=3 must be a text"), (CONFIG, [1], "is no JSON object but list")])
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem):
    with pytest.raises(ValueError, match=f"{name}:? {problem}"):
        named(tmp_path, {name: content})


def test_transformers_ends_at_those_of_its_files_too(tmp_path):
    """transformers' own objects of the same files name no other tokens."""
    files = {CONFIG: {"model_type": "llama", "eos_token_id": 1}, GENERATION: {"eos_token_id": [2]},
             OF_TOKENIZER: {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<turn>"}}
    found = named(tmp_path, files)
    WORDS.save(str(tmp_path / "tokenizer.json"))
    assert set(found) == {transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id,
                          *transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id,
                          transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id}
