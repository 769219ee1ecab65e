"""A table's entries are the rewards."""
import itertools

import numpy as np
import pytest
from reward_staging import reply

from kl_reg import rewards
from kl_reg.rewards.table import table


def saved(folder, values, name="table.npy"):
    np.save(folder / name, values)
    return table(str(folder / name))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("vocab", "tokens"), [(5, 1), (3, 3), (2, 10), (7, 4)])
def test_every_sequence_has_its_entry(tmp_path, vocab, tokens, flat):
    values = np.random.default_rng(0).normal(size=vocab**tokens)
    reward = saved(tmp_path, values if flat else values.reshape((vocab,) * tokens))
    every = [list(ids) for ids in itertools.product(range(vocab), repeat=tokens)]     # the last token goes fastest
    assert reward(completions=[""] * len(every), completion_ids=every) == values.tolist()


@pytest.mark.parametrize("ids", [[], [0, 1], [0, 1, 2, 0], [0, 1, 3], [0, -1, 2]], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_tokens_without_an_entry_are_named(tmp_path, ids, flat):
    reward = saved(tmp_path, np.zeros(27) if flat else np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match=r"'TableReward' raised ValueError: reward.path=.*table.npy.*\[.*\]"):
        rewards.score(rewards.of(reward), [reply(ids=ids)])


@pytest.mark.parametrize(("values", "message"), [
    (np.zeros((2, 3)), r"shape \(2, 3\)"), (np.zeros(()), r"shape \(\)"), (np.zeros((0, 0)), "shape"),
    (np.array([0.0, np.nan]), "finite number"), (np.array(["a"]), "finite number"), (np.array([1j]), "finite number")])
def test_what_is_no_table_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"reward.path=.*table.npy.*{message}"):
        saved(tmp_path, values)


def test_another_file_is_refused(tmp_path):
    np.savez(tmp_path / "several.npz", np.zeros(3))
    (tmp_path / "text.npy").write_text("0 1 2")
    (tmp_path / "empty.npy").write_text("")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("several.npz", "text.npy", "empty.npy", "objects.npy"):
        with pytest.raises(ValueError, match=f"reward.path=.*{name}"):
            table(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="reward.path=.*no such file"):
        table(str(tmp_path))


def test_its_digest_is_of_what_it_says(tmp_path):
    tables = [saved(tmp_path, np.arange(9.0)), saved(tmp_path, np.arange(9.0).reshape(3, 3)),
              saved(tmp_path, np.arange(1.0, 10.0))]
    assert len({own.digest() for own in tables}) == 3
    assert saved(tmp_path, np.arange(9.0), "copy.npy").digest() == tables[0].digest()
