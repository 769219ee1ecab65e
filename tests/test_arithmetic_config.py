"""configs/arithmetic_grpo.py: its answers by Python's own arithmetic, its reward by hand, and where the two meet."""
import pytest

from configs import arithmetic_grpo
from kl_reg import rewards, validation
from kl_reg.pretrained import end_tokens, folders, tokenizer
from tests.envs.staging import Stage


def test_answers_are_pythons():
    rows = arithmetic_grpo.problems()
    assert len({row["prompt"] for row in rows}) == len(rows) == 49 * 49
    for row in rows:
        shown, asked = row["prompt"].split("\n")
        left, right = shown.split(" = ")
        assert eval(left) == int(right) and asked.endswith(" =")
        assert eval(asked.removesuffix(" =")) == int(row["answer"])


def test_the_reward_is_for_the_number_alone():
    said = [" 37", "37", " 38", " 37.", " 3 7", "", " 370", " 37 38"]
    assert arithmetic_grpo.correct(said, ["37"] * len(said)) == [1.0, 1.0, *[0.0] * 6]


@pytest.mark.skipif(not folders.place("smollm2").is_dir(), reason="`python -m launch.fetch smollm2` first")
def test_what_the_model_writes_is_held_against_its_own_problem():
    config, folder = arithmetic_grpo.get_config(), folders.find("smollm2")
    validation.validate(config)
    words = tokenizer.load(folder)
    stage = Stage(words, eos=frozenset(end_tokens.named(folder, words)), **config.env.to_dict())
    asked = stage.env.openings.tokens.tolist().index(stage.ids(arithmetic_grpo.EXAMPLE + "41 + 37 ="))
    for said, worth in ((" 78\n", 1.0), (" 78<|im_end|>", 1.0), (" 79\n", 0.0), (" 78.", 0.0)):
        replies = stage.env.read(stage.transcript(stage.play(stage.ids(said)), row=asked))
        assert rewards.score(rewards.build(config.reward), replies).total.tolist() == [worth]
