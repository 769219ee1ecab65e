"""Rows of prompts from files, datasets and functions, each written by hand or by `datasets` itself."""
import datetime
import hashlib
import json
import sys
import types

import datasets
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl_reg import config as configs
from kl_reg.envs import prompts

ROWS = [{"prompt": "hi", "answer": 3, "tags": ["a"]}, {"prompt": "what is\u2028up?", "answer": None, "tags": []}]
CHATS = [{"prompt": [{"role": "user", "content": "hi"}], "answer": 3},
         {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "yo"}], "answer": 4}]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Nothing is written beside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def settings(openings, **changes):
    config = configs.default().env
    config.update({"openings": str(openings)} | changes)
    return config


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhi there\r\n\n  yo\u2028 \n".encode())
    rows = prompts.read(settings(tmp_path / "a.txt"))
    assert (rows.kind, rows.prompts, rows.columns) == (prompts.TEXT, ["hi there", "  yo\u2028 "], [{}, {}])


@pytest.mark.parametrize("rows", [ROWS, CHATS, [{"prompt": ["hi", "yo"], "answer": 1}]],
                         ids=["texts", "chats", "turns"])
def test_every_source_of_the_same_rows_gives_the_same(tmp_path, rows):
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "lines").mkdir()
    jsonl(tmp_path / "lines/train.jsonl", rows)
    jsonl(tmp_path / "lines/test.jsonl", rows[:1])
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/train.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    sources = [jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "table", tmp_path / "splits", tmp_path / "lines",
               tmp_path / "parquet", tmp_path / "parquet/train.parquet", tmp_path / "rows.json"]
    want, others = [row["prompt"] for row in rows], [{k: row[k] for k in row if k != "prompt"} for row in rows]
    digest = hashlib.sha256(json.dumps([want, others], sort_keys=True).encode()).hexdigest()
    for source in sources:
        read = prompts.read(settings(source))
        assert (read.prompts, read.columns, read.digest()) == (want, others, digest), source
    for source in ("splits", "lines"):
        assert prompts.read(settings(tmp_path / source, split="test")).prompts == want[:1]


def test_a_csv_file_is_a_table_of_texts_and_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\nhi,3\n"what, is\nup?",4\n', encoding="utf-8")
    read = prompts.read(settings(tmp_path / "a.csv"))
    assert (read.prompts, read.columns) == (["hi", "what, is\nup?"], [{"answer": 3}, {"answer": 4}])
    assert prompts.read(settings(tmp_path / "a.csv", split="train[:1]")).prompts == ["hi"]
    (tmp_path / "b.csv").write_text("prompt,answer\nhi,3\n,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match="b.csv', row 2: 'prompt' is 'None'; accepted"):
        prompts.read(settings(tmp_path / "b.csv"))


TURNS = [("user", "hi"), ("assistant", "yes"), ("user", "why?")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.mark.parametrize("chat", [
    MESSAGES, [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS],
    [{"role": role, "content": [{"type": "text", "text": part} for part in (content[:1], content[1:])]}
     for role, content in TURNS]], ids=["messages", "ShareGPT", "parts"])
def test_chats_in_the_forms_that_data_has_them(tmp_path, chat):
    rows = [{"prompt": chat}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for source in (jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        read = prompts.read(settings(source))
        assert (read.kind, read.prompts) == (prompts.CHAT, [MESSAGES])


def test_what_a_message_says_besides_is_kept(tmp_path):
    rows = [{"prompt": [{"from": "human", "value": "hi", "weight": 1}]},
            {"prompt": [{"role": "user", "content": "hi", "name": "Ann"}]}]
    assert prompts.read(settings(jsonl(tmp_path / "a.jsonl", rows))).prompts == [
        [{"role": "user", "content": "hi", "weight": 1}], [{"role": "user", "content": "hi", "name": "Ann"}]]


@given(st.text(max_size=8), st.characters(categories=["Cs"]), st.text(max_size=8),
       st.sampled_from(["text", "turns", "chat", "ShareGPT", "parts"]))
def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path_factory, before, half, after, form):
    broken = before + half + after
    prompt, good = {"text": (broken, "a"), "turns": (["a", broken], ["a"]),
                    "chat": ([{"role": "user", "content": broken}], MESSAGES),
                    "ShareGPT": ([{"from": "human", "value": broken}], MESSAGES),
                    "parts": ([{"role": "user", "content": [{"type": "text", "text": broken}]}], MESSAGES)}[form]
    file = tmp_path_factory.getbasetemp() / "surrogates.jsonl"
    file.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in (good, prompt)), encoding="utf-8")
    with pytest.raises(ValueError, match="surrogates.jsonl', line 2: 'prompt': half of a surrogate pair"):
        prompts.read(settings(file))


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"prompt": "hi \ud83d\ude00"}', encoding="utf-8")
    assert prompts.read(settings(tmp_path / "a.jsonl")).prompts == ["hi 😀"]


def made(monkeypatch, name, rows):
    """A module `made` with a function of that name."""
    module = types.ModuleType("made")
    setattr(module, name, rows)
    monkeypatch.setitem(sys.modules, "made", module)


@pytest.mark.parametrize("rows", [ROWS, CHATS, [{"prompt": ["hi", "yo"], "answer": 1}]],
                         ids=["texts", "chats", "turns"])
def test_rows_of_a_function_are_as_those_of_a_file(tmp_path, monkeypatch, rows):
    made(monkeypatch, "problems", lambda: rows)
    read, want = prompts.read(settings("made.problems")), prompts.read(settings(jsonl(tmp_path / "a.jsonl", rows)))
    assert read._replace(places=want.places) == want and read.digest() == want.digest()
    assert read.places[0] == "row 1"


@pytest.mark.parametrize(("openings", "function", "words"), [
    ("made.tsv", list, "cannot be imported: .*choose 'fixed'.*.jsonl"),
    ("made.nothing", list, "cannot be imported: .*no attribute 'nothing'"),
    ("missing_module.problems", list, "cannot be imported: No module named 'missing_module'; choose"),
    ("made.problems", lambda count: [], "called without arguments: TypeError: .*'count'"),
    ("made.problems", lambda: 1 // 0, "called without arguments: ZeroDivisionError"),
    ("made.problems", [{"prompt": "a"}], r"is \[{'prompt': 'a'}\], no function"),
    ("made.problems", lambda: {"prompt": "a"}, "returned \"{'prompt': 'a'}\"; accepted is a list of dictionaries"),
    ("made.problems", lambda: ["a"], "returned .*accepted is a list of dictionaries.*'prompt'"),
    ("made.problems", lambda: [{"prompt": "a", 3: "b"}], "returned .*names of columns"),
    ("made.problems", list, "is empty"),
    ("made.problems", lambda: [{"prompt": "a"}, {"text": "b"}], "row 2 has no column 'prompt'.*there are text")])
def test_a_function_that_cannot_be_used_is_named(monkeypatch, openings, function, words):
    made(monkeypatch, "problems", function)
    with pytest.raises(ValueError, match=f"env.openings='{openings}'.*{words}"):
        prompts.read(settings(openings))


def test_another_column_and_lines_that_lack_some(tmp_path):
    rows = [{"q": "a", "x": 1}, {"q": "b", "y": 2}]
    read = prompts.read(settings(jsonl(tmp_path / "a.jsonl", rows), column="q"))
    assert read.prompts == ["a", "b"] and read.columns == [{"x": 1, "y": None}, {"x": None, "y": 2}]


def test_the_digest_is_of_prompts_and_columns():
    one = prompts.Rows(prompts.TEXT, ["a"], [{"x": datetime.date(2024, 1, 2)}], ["row 1"])
    others = [one._replace(prompts=["b"]), one._replace(columns=[{"x": datetime.date(2024, 1, 3)}]),
              one._replace(columns=[{"y": datetime.date(2024, 1, 2)}])]
    assert len({rows.digest() for rows in (one, *others)}) == 4
    assert one.digest() == one._replace(places=["line 7"]).digest()


@pytest.mark.parametrize(("value", "kind"), [
    (object(), "object"), (torch.tensor([1, 2]), "torch.Tensor"), ([{"deep": torch.tensor(1)}], "list"),
    (PIL.Image.new("RGB", (2, 2)), "PIL.Image.Image"), ({(1, 2): 3}, "dict"), ({1, 2}, "set")])
def test_a_column_that_has_no_fingerprint_is_named(value, kind):
    rows = prompts.Rows(prompts.TEXT, ["a", "b"], [{"good": 1, "picture": 3}, {"good": 2, "picture": value}],
                        ["line 1", "line 7"])
    with pytest.raises(ValueError, match=f"the column 'picture' holds {kind} in line 7, .*remove the column"):
        rows.digest()


def test_a_dataset_in_another_format_is_read_or_its_column_named(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "hi", "answer": 3}])
    for kind, words in (("torch", "'answer' holds torch.Tensor in row 1"), ("numpy", None)):
        table.with_format(kind).save_to_disk(tmp_path / kind)
        read = prompts.read(settings(tmp_path / kind))
        if words is None:
            assert read.digest() == prompts.Rows(prompts.TEXT, ["hi"], [{"answer": 3}], ["row 1"]).digest()
            continue
        with pytest.raises(ValueError, match=words):
            read.digest()


def test_a_dataset_of_the_hub_is_asked_for_by_name_subset_and_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **how: asked.append(how) or [{"prompt": "hi"}])
    for name in ("org/name", "org/name:main@v1"):
        assert prompts.read(settings(name, split="test[:9]")).prompts == ["hi"]
    assert asked == [{"path": "org/name", "name": None, "revision": None, "split": "test[:9]"},
                     {"path": "org/name", "name": "main", "revision": "v1", "split": "test[:9]"}]

    def missing(**how):
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(FileNotFoundError, match="env.openings='org/name', env.split='train': cannot reach the hub"):
        prompts.read(settings("org/name"))


def test_without_datasets_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'kl_reg\[data\]'"):
        prompts.read(settings(tmp_path))


MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(("content", "words"), [
    ("", "is empty"), ("\n \n", "is empty"),
    ('{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3 is no JSON: .*delimiter"),
    ('["a"]\n', r'line 1 is no JSON object but \["a"\]'),
    ('{"prompt": "a"}\n{"text": "b", "n": 1}\n', "line 2 has no column 'prompt'.*there are text, n"),
    ('{"prompt": 3}\n', "line 1: 'prompt' is '3'; accepted are a text, a chat"),
    ('{"prompt": []}\n', r"line 1: 'prompt' is '\[\]'"),
    ('{"prompt": [{"role": "user"}]}\n', "line 1: 'prompt' is"),
    (json.dumps({"prompt": [MESSAGE | {"content": None}]}), "line 1: 'prompt' is"),
    (json.dumps({"prompt": [MESSAGE, MESSAGE | {"content": [{"type": "image_url", "image_url": "x"}]}]}),
     r"line 1: 'prompt': message 2 has a part that is no text \('image_url'\); accepted are parts {\"type\": \"text\""),
    (json.dumps({"prompt": [{"from": "bing", "value": "hi"}]}),
     "line 1: 'prompt': turn 1 is from 'bing'; known are human, gpt, .*convert the chat to messages"),
    (json.dumps({"prompt": [{"from": "human", "value": None}]}), "line 1: 'prompt' is"),
    (json.dumps({"prompt": [MESSAGE, {"from": "human", "value": "a"}]}), "line 1: 'prompt' is"),
    (json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": [MESSAGE]}),
     "'prompt' is a text in line 1 and a chat in line 2"),
    *((json.dumps({"prompt": "a", name: 1}), f"rename {name}")
      for name in ("prompts", "completions", "completion_ids"))])
def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"env.openings='{tmp_path / 'a.jsonl'}'.*{words}"):
        prompts.read(settings(tmp_path / "a.jsonl"))


def test_sources_that_are_none_are_named(tmp_path, monkeypatch):
    for missing in ("a.txt", "a.jsonl", "a.csv", "a.json", "a.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"{missing}"):
            prompts.read(settings(tmp_path / missing))
    (tmp_path / "a.tsv").write_text("prompt\nhi\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="env.openings='none.csv': missing; choose"):
        prompts.read(settings("none.csv"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9\n")
    for source, words in ((tmp_path / "a.tsv", "'fixed'.*'held_out'.*.jsonl, .json, .csv or .parquet.*dotted path"),
                          ("a.tsv", "'a.tsv': not accepted"), ("mine", "env.openings='mine'.*fixed"),
                          (tmp_path / "latin.txt", "is not UTF-8")):
        with pytest.raises(ValueError, match=words):
            prompts.read(settings(source))


def test_datasets_that_cannot_be_used_are_named(tmp_path):
    table = datasets.Dataset.from_list([{"text": "hi", "n": 1}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "lines").mkdir()
    jsonl(tmp_path / "lines/valid.jsonl", [{"text": "hi"}])
    (tmp_path / "nothing").mkdir()
    for source, split, kind, words in (
            ("splits", "dev", ValueError, "env.split='dev': no such split; there are train, test"),
            ("splits", "train", ValueError, "row 1 has no column 'prompt'.*there are text, n"),
            ("lines", "dev", ValueError, "env.split='dev': .*validation"),
            ("nothing", "train", FileNotFoundError, "nothing', env.split='train': .*data files")):
        with pytest.raises(kind, match=words):
            prompts.read(settings(tmp_path / source, split=split))


def test_openings_that_are_too_long_are_left_out_with_one_warning():
    rows = prompts.plain(prompts.TEXT, ["a", "b", "c"])
    config = settings("x.txt", opening_tokens=4)
    with pytest.warns(UserWarning, match="2 of 3 openings are left out.*env.opening_tokens=4") as warned:
        assert prompts.fitting(config, rows, [5, 4, 6]) == [1]
    assert len(warned) == 1
    assert prompts.fitting(config, rows, [1, 4, 2]) == [0, 1, 2]
    with pytest.raises(ValueError, match="the shortest of 3 openings has 5 tokens, env.opening_tokens=4"):
        prompts.fitting(config, rows, [5, 7, 6])
    with pytest.raises(ValueError, match="row 2: the prompt has no tokens"):
        prompts.fitting(config, rows, [1, 0, 1])


def test_openings_have_two_slots_at_least():
    tokens, start = prompts.padded([[7]])
    assert (tokens.tolist(), start.tolist()) == ([[0, 7]], [1])
    tokens, start = prompts.padded([[7], [1, 2, 3]])
    assert (tokens.tolist(), start.tolist()) == ([[0, 0, 7], [1, 2, 3]], [2, 0])
