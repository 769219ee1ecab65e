"""`python -m launch.export` on members of every kind: torch's reading of a folder against our decoder with the member's
own parameters. Members are random, not trained: a checkpoint of each is written as training writes it."""
import ast
import json
import pathlib
import re
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kl_reg import config as configs
from kl_reg.export import model_card
from kl_reg.policies import kinds as policies
from kl_reg.policies.actor import Situation
from kl_reg.pretrained import folders, tokenizer, weights
from kl_reg.pretrained.fetch import fetch
from kl_reg.runs import checkpoint
from kl_reg.runs import directory as run_directory
from kl_reg.types import TrainState, Transcript
from launch import export
from tests import tiny_gguf

OPENING, LENGTH, NEW = "<|start|>A: hi\n", 48, 36
FULL, LORA, HEAD, BUDGET, AWAY = range(5)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """Checkpoints 1 and 2 of five members, and a summary; temperature 0.5."""
    folder, config = tmp_path_factory.mktemp("runs") / "small", configs.default()
    config.model.path, config.policy.hidden, config.rl.iterations = str(tiny_folder), 4, 2
    config.env.opening, config.env.length, config.sampling.temperature = OPENING, LENGTH, 0.5
    config.sweep = [{"policy.kind": ("full", "lora")}, {"policy.layers": (1,)},
                    {"kl.budget": (3.0,), "kl.turn_budget": (1.0,)},
                    {"reference.name": ("mixture",), "reference.paths": ((str(tiny_folder),) * 2,)}]
    checkpoint.claim(folder, {"config": json.loads(config.to_json()), "fingerprint": "0123456789ab",
                              "base": folders.digest(tiny_folder)})
    base, saved = weights.load(str(tiny_folder)), checkpoint.Checkpoints(folder / "checkpoints", {}, 9)
    for iteration in (1, 2):
        saved.save(iteration, [_state(base, members, iteration) for members in run_directory.groups(config)])
    saved.close()
    final = {"kl/nats_per_episode": 12.5, "kl/nats_per_episode_se": 0.5, "return": 2.25, "return_se": None,
             "episodes": 77}
    (folder / "summary.json").write_text(json.dumps([{"member": i, "final": final} for i in range(5)]))
    return folder


def _state(base, members, iteration):
    rng, rows = np.random.default_rng(iteration), []
    for _, own in members:
        shapes = jax.eval_shape(policies.build(own.policy.kind, base.config, own.policy).init, jax.random.key(0),
                                base.params)
        moved = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)
        if own.policy.kind == "full":
            moved["trunk"] = jax.tree.map(lambda x, change: np.array(x) + change, base.params, moved["trunk"])
        rows.append(moved)
    numbers = np.arange(len(rows), dtype=np.int32)
    return TrainState(jax.tree.map(lambda *x: np.stack(x), *rows), (), numbers, numbers)


@pytest.fixture
def call(capsys):
    def call(*arguments):
        capsys.readouterr()
        try:
            export.main(list(map(str, arguments)))
            status = 0
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr()

    return call


def ours(run, number, tokens, inputs=(0.0, 0.0), iteration=None):
    """Logits [t, v] of the token behind each of `tokens`, by the policy that trains."""
    member = run_directory.load(run, iteration)[number]
    base, own = weights.load(member.config.model.path), member.config.policy
    agent, count = policies.build(own.kind, base.config, own), len(tokens)
    position = jnp.arange(1, count + 1) - len(prompt_ids(run))
    left, part = inputs
    row = jnp.array([tokens])
    transcript = Transcript(row, jnp.zeros_like(row), jnp.zeros_like(row), jnp.zeros(1, jnp.int32))
    situation = Situation(*(jnp.full((1, count), x) for x in (left / (1 - left) if left else jnp.inf, part)),
                          (jnp.maximum(position, 0) / LENGTH)[None])

    @jax.jit
    def logits(params):
        features = agent.reread(params, base.params, transcript, jnp.arange(1, count + 1)[None])
        reading = agent.read(params, base.params, features, situation)
        return (reading.base_logits + reading.gap)[0], reading.base_logits[0]

    said, before = logits(jax.tree.map(jnp.asarray, member.params))
    assert np.abs(said - before).max() > 0.5                          # the member has moved
    return np.array(said)


def prompt_ids(run):
    words = tokenizer.load(folders.find(run_directory.config_of(run).model.path))
    return tokenizer.opening(words, f"{OPENING}A:")


def check(run, number, theirs, said, **others):
    """Torch's logits are ours, and each of its greedy tokens is what we would have said."""
    prompt = prompt_ids(run)
    expected = ours(run, number, prompt + said, **others)
    np.testing.assert_allclose(theirs, expected, atol=1e-4)
    assert len(said) == NEW and len(set(said)) > 2
    assert said == expected[len(prompt) - 1:-1].argmax(-1).tolist()


def card_of(folder):
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return text, code


@pytest.mark.parametrize("number", [FULL, LORA])
def test_transformers_says_what_the_member_says(run, call, tmp_path, number, monkeypatch, capsys):
    out = tmp_path / "exports/here"
    status, printed = call(f"{run}:{number}", f"--out={out}")
    assert status == 0 and printed.out.endswith(f"\nmodel  {out}\ncard   {out}/README.md\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = torch.tensor([prompt_ids(run)])
    said = model.generate(prompt, max_new_tokens=NEW, do_sample=False, temperature=None, top_k=None, top_p=None)[0]
    with torch.no_grad():
        check(run, number, model(said[None]).logits[0].numpy(), said[prompt.shape[1]:].tolist())
    drawing = json.loads((out / "generation_config.json").read_text())
    (start,) = tokenizer.encode(tokenizer.load(out), "<|start|>")
    assert drawing == {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 1.0, "bos_token_id": start,
                       "eos_token_id": start, "pad_token_id": start}
    text, code = card_of(out)
    for part in (f"| member | `{number}` |", "| iteration | `2` |", "`0123456789ab`", "12.5 ± 0.5 nats per episode",
                 "return: 2.25 (reward", "77 episodes", "| sampling.temperature | `0.5` |"):
        assert part in text
    assert code.replace("folder = '.'", f"folder = {str(out)!r}") in printed.out
    torch.manual_seed(0)
    monkeypatch.chdir(out)
    exec(code, {})
    assert capsys.readouterr().out.startswith("<|start|>A: hi\nA:")
    assert sorted(path.name for path in out.parent.iterdir()) == ["here"]


def test_what_was_written_is_read_back(run, call, tmp_path):
    member = run_directory.load(run, 1)[FULL]
    assert call(f"{run}:{FULL}@1", f"--out={tmp_path}/whole")[0] == 0
    for path, expected in jax.tree.leaves_with_path(member.params["trunk"]):
        found = weights.load(str(tmp_path / "whole")).params
        for key in path:
            found = found[key.key]
        np.testing.assert_array_equal(found, expected)
    assert "Not evaluated" in card_of(tmp_path / "whole")[0]
    assert call(f"{run}:{FULL}", "--step=1", "--dtype=bfloat16", f"--out={tmp_path}/half")[0] == 0
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    embed = weights.load(str(tmp_path / "half"), "bfloat16").params["embed"]
    np.testing.assert_array_equal(embed, member.params["trunk"]["embed"].astype(jnp.bfloat16))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")      # PEFT's own use of transformers
@pytest.mark.parametrize("options", [[], ["--with-base"]])
def test_the_adapter_says_what_the_member_says(run, call, tmp_path, capsys, monkeypatch, options):
    """A base beside it is found where the folder has moved, too."""
    out = tmp_path / "adapter"
    status, printed = call(f"{run}:{LORA}", "--adapter", f"--out={out}", *options)
    assert status == 0 and (f"base   {out}/base: as asked for\n" in printed.out) == bool(options)
    if options:
        out = out.rename(tmp_path / "moved")
    check_adapter(run, out, capsys, monkeypatch)


def check_adapter(run, out, capsys, monkeypatch):
    """The card's code in `out`: PEFT's logits are ours."""
    code, scope = card_of(out)[1], {}
    monkeypatch.chdir(out)
    exec(code, scope)
    assert capsys.readouterr().out.startswith("<|start|>A: hi\nA:")
    prompt = prompt_ids(run)
    said = scope["model"].generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0]
    with torch.no_grad():
        check(run, LORA, scope["model"](said[None]).logits[0].numpy(), said[len(prompt):].tolist())


@pytest.fixture
def opened(run, call, tmp_path, monkeypatch, capsys):
    """Exports a head and runs the code of its card: (the text of the card, what the code has defined)."""
    def opened(number, *options):
        monkeypatch.setattr(sys, "path", sys.path[:])
        out, scope = tmp_path / "head", {}
        status, printed = call(f"{run}:{number}", f"--out={out}", *options)
        base = f"base   {out}/base: as asked for\n" * ("--with-base" in options)
        assert status == 0 and printed.out.endswith(f"\nhead   {out}\n{base}card   {out}/README.md\n")
        text, code = card_of(out)
        sys.modules.pop("head_policy", None)        # of another export
        monkeypatch.chdir(out)
        sys.path_importer_cache.pop(".", None)      # it holds the folder that this was
        exec(code, scope)
        assert capsys.readouterr().out.startswith("<|start|>A: hi\nA:")
        assert pathlib.Path(scope["head_policy"].__file__).samefile(out / "head_policy.py")
        return text, scope["policy"]

    return opened


def test_the_head_says_what_the_member_says(run, opened):
    """A proposal: it sees one nat for its first turn, 1 / (1 + 1), and that of the budget all is left."""
    (text, loaded), prompt = opened(BUDGET, "--proposal"), prompt_ids(run)
    assert "not the policy that was trained" in text and "12.5" not in text
    said = loaded.generate(prompt, len(prompt), NEW, greedy=True)
    with torch.no_grad():
        check(run, BUDGET, loaded(torch.tensor([prompt + said]), len(prompt))[0].numpy(), said, inputs=(0.5, 1.0))
    with pytest.raises(ValueError, match=f"an episode has {LENGTH} tokens"):
        loaded.generate(prompt, len(prompt), LENGTH + 1)


def test_a_head_draws_at_the_runs_temperature(run, opened, tmp_path):
    """The same generator draws the same tokens from our distributions; nothing is drawn behind a stop."""
    (text, loaded), prompt = opened(HEAD, "--with-base"), prompt_ids(run)
    assert "12.5 ± 0.5 nats" in text and json.loads((tmp_path / "head/head.json").read_text())["base"]["path"] == "base"
    draw = lambda **stop: loaded.generate(  # noqa: E731
        prompt, len(prompt), 12, generator=torch.Generator().manual_seed(0), **stop)
    said, generator = draw(), torch.Generator().manual_seed(0)
    expected = torch.tensor(ours(run, HEAD, prompt + said)[len(prompt) - 1:-1] / 0.5).softmax(-1)
    assert said == [int(torch.multinomial(row, 1, generator=generator)) for row in expected]
    assert said != expected.argmax(-1).tolist()
    assert draw(stop=lambda so_far: len(so_far) == 5) == said[:5]


def test_the_loader_needs_torch_and_transformers_alone(run, call, tmp_path):
    call(f"{run}:{HEAD}", f"--out={tmp_path}/head")
    tree = ast.parse((tmp_path / "head/head_policy.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert outside == {"torch", "transformers", "safetensors", "packaging"}      # transformers needs the last two


@pytest.mark.parametrize("arguments, says", [
    (("{run}", "--out={out}"), "there are :0 kl.coef=0.0, seed=0, policy.kind=full,.*; :4 "),
    (("{run}:9", "--out={out}"), "as {run}:0; there are :0"), (("{run}:0@7", "--out={out}"), "there are 1, 2"),
    (("{run}:0@1", "--step=2", "--out={out}"), "two checkpoints"), (("nowhere", "--out={out}"), "'nowhere' is no run"),
    (("{run}:3", "--out={out}"), "hard budget.*--proposal exports"), (("{run}:4", "--out={out}"), "'mixture'.*{tiny}"),
    (("{run}:0", "--proposal", "--out={out}"), "--proposal is for a member with a hard budget"),
    (("{run}:0", "--adapter", "--out={out}"), "--adapter is for .*'lora'"),
    (("{run}:1", "--with-base", "--out={out}"), "--with-base is for .*'head', or --adapter"),
    (("{run}:0", "--dtype=float8", "--out={out}"), "choose float32 or bfloat16"), (("{run}:0",), "required: --out"),
    (("{run}:0", "--out={run}"), "{run} is there already")])
def test_a_wrong_call_is_one_line_and_leaves_nothing(run, call, tiny_folder, tmp_path, arguments, says):
    known = {"run": run, "out": tmp_path / "new/out", "tiny": tiny_folder}
    status, printed = call(*(text.format(**known) for text in arguments))
    assert status == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
    assert re.search(says.format(**known), printed.err)
    assert not list(tmp_path.iterdir())


def other_run(run, folder, **stored):
    """The same checkpoints with another config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | stored))
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    return folder


def test_a_base_in_int8_is_written_as_the_run_has_seen_it(run, call, tmp_path, tiny_folder):
    config = json.loads((run / "config.json").read_text())["config"]
    config["model"]["quantize"] = "int8"
    copy = other_run(run, tmp_path / "run", config=config)
    for number, name, options in ((LORA, "adapter", ["--adapter"]), (HEAD, "head", [])):
        status, printed = call(f"{copy}:{number}", f"--out={tmp_path}/{name}", *options)
        assert status == 0 and f"base   {tmp_path}/{name}/base: the run's base has model.quantize='int8'" in printed.out
        assert "in floats: the run's base has model.quantize='int8'" in (tmp_path / name / "README.md").read_text()
    call(f"{copy}:{LORA}", f"--out={tmp_path}/lora")
    whole = np.array(weights.load(str(tiny_folder)).params["layers"]["down"]["kernel"])
    step = np.abs(whole).max(1, keepdims=True) / 127
    rounded, low = np.round(whole / step) * step, run_directory.load(run)[LORA].params["adapter"]["down"]
    for found, expected in (("lora", rounded + 16 / 8 * low["a"] @ low["b"]), ("head/base", rounded),
                            ("adapter/base", rounded)):
        kernel = weights.load(str(tmp_path / found)).params["layers"]["down"]["kernel"]
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
    assert np.abs(rounded - whole).max() > 1e-4


def test_a_truncation_that_no_file_can_say_is_in_the_card(run, call, tmp_path):
    config = json.loads((run / "config.json").read_text())["config"]
    config["sampling"]["top_k"] = 5
    call(f"{other_run(run, tmp_path / 'run', config=config)}:{FULL}", f"--out={tmp_path}/out")
    text, _ = card_of(tmp_path / "out")
    assert "(top_k=5, top_p=1, min_p=0) that the reference's probabilities decide" in text
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_k"] == 0


@pytest.mark.parametrize("kind", ["model", "adapter", "head"])
def test_the_code_of_the_card_has_the_tokens_of_training(tiny_folder, kind):
    """Not their text, which other libraries may tokenise otherwise; a written turn ends with the student's prefix."""
    config, words = configs.default(), tokenizer.load(tiny_folder)
    config.env.opening, config.env.markers = OPENING, "written"
    member = run_directory.Member(config, {}, None, 0, "")
    code = model_card.snippet(model_card.Facts(None, member, "", "", kind, False, tiny_folder, ""), "out")
    ids = tokenizer.encode(words, f"{OPENING}A:")
    assert re.search(rf"^prompt = (torch.tensor\(\[)?{re.escape(str(ids))}", code, re.MULTILINE)
    assert repr("\nB:") in code and "tokenizer(" not in code
    compile(code, "card", "exec")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")      # PEFT's own use of transformers
def test_an_adapter_on_a_gguf_file_has_its_base_beside_it(tmp_path, call, capsys, monkeypatch):
    """In floats, as PEFT's logits and ours agree; the card says why."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    base, _ = fetch(str(tmp_path / "tiny.gguf"), tmp_path / "base")
    config, folder, words = configs.default(), tmp_path / "run", tokenizer.load(base)
    config.model.path, config.policy.kind, config.rl.iterations = str(base), "lora", 1
    config.env.opening, config.env.teacher, config.env.length = "hello there", ", how", LENGTH
    checkpoint.claim(folder, {"config": json.loads(config.to_json()), "fingerprint": "0123456789ab",
                              "base": folders.digest(base)})
    saved = checkpoint.Checkpoints(folder / "checkpoints", {}, 9)
    saved.save(1, [_state(weights.load(str(base)), members, 1) for members in run_directory.groups(config)])
    saved.close()
    status, printed = call(folder, "--adapter", f"--out={tmp_path}/out")
    assert status == 0 and f"base   {tmp_path}/out/base: the base's weights are in a GGUF file\n" in printed.out
    text, code = card_of(tmp_path / "out")
    assert "in floats: the base's weights are in a GGUF file" in text
    monkeypatch.chdir(tmp_path / "out")
    scope = {}
    exec(code, scope)
    tokens = tokenizer.opening(words, "hello there, how are you?")
    with torch.no_grad():
        theirs = scope["model"](torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(theirs, ours(folder, 0, tokens), rtol=1e-5, atol=1e-3)       # of up to 40


def test_the_card_has_a_header_and_no_path_of_this_machine(run, call, tmp_path, tiny_folder):
    """The hub's client reads the header; settings keep the last part of a path."""
    config = json.loads((run / "config.json").read_text())["config"]
    config["reward"]["path"], config["env"]["student_model"] = "/home/me/secret/model", str(tiny_folder)
    copy = other_run(run, tmp_path / "run", config=config)
    for number, library, options in ((FULL, "transformers", []), (LORA, "peft", ["--adapter"]), (HEAD, "pytorch", [])):
        out = tmp_path / library
        assert call(f"{copy}:{number}", f"--out={out}", *options)[0] == 0
        text = (out / "README.md").read_text()
        found = huggingface_hub.ModelCard(text).data
        assert (found.library_name, found.pipeline_tag) == (library, "text-generation") and "kl_reg" in found.tags
        assert found.base_model is None                                 # it is no model of the hub
        assert str(tmp_path) not in text and str(tiny_folder.parent) not in text and "/home" not in text
        assert "| reward.path | `'model'` |" in text and f"| base model | `{tiny_folder.name}` |" in text


def test_the_header_names_a_base_on_the_hub(tiny_folder):
    config = configs.default()
    config.model.path = "org/name@main"
    member = run_directory.Member(config, {}, None, 0, "")
    for kind, relation in (("adapter", "adapter"), ("model", "finetune")):
        facts = model_card.Facts(run_directory.Address(pathlib.Path("runs/x"), 0, 1), member, "", "", kind, False,
                                 tiny_folder, "")
        found = huggingface_hub.ModelCard(model_card.text(facts)).data
        assert (found.base_model, found.base_model_relation) == ("org/name", relation)


def test_a_base_that_is_another_one_now_is_refused(run, call, tmp_path):
    copy = other_run(run, tmp_path / "run", base="0-0")
    status, printed = call(f"{copy}:0", f"--out={tmp_path}/out")
    assert status == 2 and "trained on another model" in printed.err and not (tmp_path / "out").exists()
