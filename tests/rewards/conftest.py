import pytest
from reward_staging import save_distilbert


@pytest.fixture(scope="session")
def distilbert(tmp_path_factory):
    """The folder of a random DistilBERT."""
    folder = tmp_path_factory.mktemp("distilbert")
    save_distilbert(folder)
    return folder
