"""Prices against torch's log-probabilities on the very transcripts that were sampled, and against enumeration."""
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from kl_reg.analysis.behaviour.script_price import Dialogue, Price, price_of_script, random_letters, report
from kl_reg.pretrained import chitchat, tokenizer, weights

OPENINGS = ("<|start|>A: hi\nB: hello\n", "<|start|>A: how are you?\nB: I am good, it is\n")
CHITCHAT = Dialogue(*chitchat.SPEAKERS, chitchat.END)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tiny_folder):
    return weights.load(str(tiny_folder))


@pytest.fixture(scope="module")
def torch_log_probs(tiny_folder):
    """Token ids [b, t] -> log-probabilities of the next token [b, t, v]."""
    loaded = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    def log_probs(ids):
        with torch.no_grad():
            return loaded(torch.tensor(ids)).logits.log_softmax(-1).numpy().astype(np.float64)

    return log_probs


def reread(tok, ids, script, turns, dialogue, max_reply):
    """Slots of the script's tokens in each turn, and how many replies were cut, found by reading the rules aloud."""
    encode = lambda text: tokenizer.encode(tok, text)  # noqa: E731
    opening = next(o for o in (tokenizer.encode(tok, text) for text in OPENINGS) if ids[:len(o)] == o)
    slots, cut, at = [], 0, len(opening)

    def forced(expected):
        nonlocal at
        assert ids[at:at + len(expected)] == expected
        at += len(expected)
        return range(at - len(expected), at)

    for turn in range(turns):
        forced(encode(dialogue.teacher))
        slots.append(forced(encode((" " + script if script else "") + dialogue.end)))
        if turn == turns - 1:
            break
        forced(encode(dialogue.student))
        first = at
        while dialogue.end not in tokenizer.decode(tok, ids[first:at]):
            if at - first == max_reply:
                forced(encode(dialogue.end))
                cut += 1
                break
            at += 1
    assert at == len(ids)
    return slots, cut


@pytest.mark.parametrize("dialogue", [CHITCHAT, Dialogue(" T:", "B:", "\n\n")])
def test_the_price_is_torchs_surprisal_of_the_sampled_transcripts(model, tiny_tokenizer, torch_log_probs, dialogue):
    scripts, turns, episodes, max_reply = ("", "hello"), 3, 4, 3
    prices = price_of_script(model, OPENINGS, scripts, turns, episodes, 0, dialogue, max_reply, batch=3)
    cuts, seen = 0, set()
    for script, price in zip(scripts, prices, strict=True):
        assert price.script == script and price.nats.shape == (episodes, turns)
        assert price.replies == episodes * (turns - 1)
        found = 0
        for ids, nats in zip(price.tokens, price.nats, strict=True):
            slots, cut = reread(tiny_tokenizer, ids, script, turns, dialogue, max_reply)
            log_probs = torch_log_probs([ids])[0]
            expected = [-sum(log_probs[t - 1, ids[t]] for t in turn) for turn in slots]
            np.testing.assert_allclose(nats, expected, rtol=1e-4)
            found += cut
            seen.add(tuple(ids))
        assert price.cut == found
        cuts += found
    assert cuts > 0 and len(seen) == len(scripts) * episodes


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_mean_over_episodes_is_the_expectation_over_the_students_replies(model, tiny_tokenizer, torch_log_probs,
                                                                             temperature):
    """Replies of one token: all 300 are enumerated, an end marker among them or written behind. The student alone has
    another temperature."""
    encode = lambda text: tokenizer.encode(tiny_tokenizer, text)  # noqa: E731
    (end,), teacher, script = encode("\n"), encode("A:"), encode(" hi\n")
    before = encode(OPENINGS[0]) + teacher + script + encode("B:")
    chance = np.exp(torch_log_probs([before])[0, -1] / temperature)
    chance /= chance.sum()
    costs = np.zeros(300)
    for ends in (True, False):
        middle = [] if ends else [end]
        tokens = [t for t in range(300) if (t == end) == ends]
        log_probs = torch_log_probs([before + [t] + middle + teacher + script for t in tokens])
        costs[tokens] = -sum(log_probs[:, i - len(script) - 1, token] for i, token in enumerate(script))
    mean = chance @ costs
    deviation = np.sqrt(chance @ (costs - mean) ** 2)
    assert chance[end] < 0.9 and deviation > 0.1

    price, = price_of_script(model, OPENINGS[:1], ["hi"], 2, 2000, 1, CHITCHAT, max_reply=1, batch=500,
                             student_temperature=temperature)
    assert abs(price.nats[:, 1].mean() - mean) < 4 * deviation / 2000**0.5
    assert abs(price.cut / 2000 - (1 - chance[end])) < 4 * (chance[end] * (1 - chance[end]) / 2000) ** 0.5
    curve = report([price], tiny_tokenizer)[0]["per_turn"]
    assert curve["error"][1] == pytest.approx(deviation / 2000**0.5, rel=0.2)
    assert curve["error"][0] == pytest.approx(0.0, abs=1e-6)       # one opening: all first turns are the same


def test_without_a_limit_only_episodes_whose_turns_fit_the_context_have_a_price(model, tiny_tokenizer):
    price, = price_of_script(model, OPENINGS[:1], [""], 4, 16, 1, CHITCHAT)
    ends = [reread(tiny_tokenizer, ids, "", 4, CHITCHAT, 99)[1] for ids in price.tokens if len(ids) < 64]
    assert 0 < len(ends) < 16 and not any(ends) and price.cut == 0
    assert price.nats.shape == (len(ends), 4) and (price.nats > 0).all()
    assert max(map(len, price.tokens)) == 64


def test_means_errors_and_sums_by_hand(tiny_tokenizer):
    nats = np.array([[1.0, 2.0], [3.0, 2.0]])
    row, = report([Price("hi", nats, 1, 2, [tokenizer.encode(tiny_tokenizer, "A: hi\n")])], tiny_tokenizer)
    quantile = 12.7062      # of Student's distribution with one degree of freedom, 97.5%
    assert row["per_turn"]["mean"] == [2.0, 2.0] and row["per_turn"]["error"] == [1.0, 0.0]
    assert row["cumulative"]["mean"] == [2.0, 4.0] and row["cumulative"]["error"] == [1.0, 1.0]
    assert row["cumulative"]["low"] == pytest.approx([2 - quantile, 4 - quantile], abs=1e-3)
    assert row["cumulative"]["high"] == pytest.approx([2 + quantile, 4 + quantile], abs=1e-3)
    assert (row["episodes"], row["cut_replies"], row["replies"], row["transcript"]) == (2, 1, 2, "A: hi\n")
    one, = report([Price("hi", nats[:1], 0, 1, [[1]])], tiny_tokenizer)
    assert one["cumulative"]["mean"] == [1.0, 3.0] and one["cumulative"]["error"] == [None, None]


def test_random_letters_are_those_of_the_seed():
    assert random_letters(5, 0) == random_letters(5, 0) != random_letters(5, 1)
    assert len(random_letters(5, 0)) == 5 and random_letters(200, 0).islower() and random_letters(200, 0).isalpha()


@pytest.mark.parametrize("change, says", [
    ({"turns": 0}, "turns=0: at least 1"), ({"episodes": 0}, "episodes=0"), ({"max_reply": 0}, "max_reply=0"),
    ({"scripts": ()}, "scripts is empty"), ({"openings": ()}, "openings is empty"),
    ({"student_temperature": 0.0}, "student_temperature=0.0 must be a finite number above 0"),
    ({"dialogue": Dialogue("A:", "", "\n")}, "student='' gives no tokens"),
    ({"scripts": ("yes\nno",)}, "script='yes\\nno' holds the end of a turn"),
    ({"turns": 30}, "do not fit the model's context of 64"),
    ({"openings": ("xyz " * 40,), "max_reply": None}, "do not fit the model's context of 64")])
def test_a_wrong_setting_is_named(model, change, says):
    settings = {"openings": OPENINGS, "scripts": ("",), "turns": 2, "episodes": 2, "seed": 0, "dialogue": CHITCHAT,
                "max_reply": 4}
    with pytest.raises(ValueError) as error:
        price_of_script(model, **settings | change)
    assert says in str(error.value)
