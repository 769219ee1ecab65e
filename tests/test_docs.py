import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"]
WITHOUT_CODE = ("log.md",)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WITHOUT_CODE], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, "the page has no Python block, or the pattern no longer finds it"
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_paths_that_a_page_names_exist(page):
    named = re.findall(r"`((?:kl_reg|configs|launch|docs|tests|benchmarks|tpu_scripts)/[\w/.]+)`", page.read_text())
    named += re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()]
    assert not missing


def test_every_command_that_the_readme_gives_exists():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/guide.md").read_text()
    for command in re.findall(r"python -m launch\.(\w+)", text):
        assert (ROOT / f"launch/{command}.py").is_file()
    for config in re.findall(r"--config=(\S+\.py)", text):
        assert (ROOT / config).is_file()
