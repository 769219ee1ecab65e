"""Models whose tokens are the letters a to d."""
import pytest

from kl_reg.envs.tabular import make_model
from kl_reg.pretrained import tokenizer


@pytest.fixture(scope="session")
def letter_folders(tmp_path_factory):
    """With the seeds 0 to 5."""
    root = tmp_path_factory.mktemp("letters")
    for seed in range(6):
        make_model(root / str(seed), 4, seed)
    return [root / str(seed) for seed in range(6)]


@pytest.fixture(scope="session")
def letter_tokenizer(letter_folders):
    return tokenizer.load(letter_folders[0])
