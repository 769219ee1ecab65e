import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))      # scenario.py, which other processes read, too


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Prompts of several lengths."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("A: hi\nhello there\nA: what a day it is\n")
    return str(file)
