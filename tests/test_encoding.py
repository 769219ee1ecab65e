"""Files are read and written in UTF-8 whatever the locale is: every call that opens a text says so."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("kl_reg", "launch", "benchmarks", "configs")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
ENCODING_AT = {"read_text": 0, "write_text": 1}     # position of the argument
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}     # position of the mode
BINARY = {"NamedTemporaryFile", "TemporaryFile"}    # binary where no mode is given
ARCHIVES = {"archive"}                              # a ZipFile's files are bytes


def unspecified(source: str) -> list[int]:
    """Lines of the calls that open a text in the locale's encoding."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _unspecified(node)]


def _unspecified(call):
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ENCODING_AT:
        return len(call.args) <= ENCODING_AT[name]
    if name == "TextIOWrapper":
        return len(call.args) < 2
    if name not in OPENERS or method and getattr(call.func.value, "id", "") in ARCHIVES:
        return False
    on_path = method and name == "open" and getattr(call.func.value, "id", "") not in ("io", "codecs", "gzip")
    place = OPENERS[name] - on_path
    mode = given.get("mode", call.args[place] if len(call.args) > place else None)
    if mode is None:
        return name not in BINARY
    return not (isinstance(mode, ast.Constant) and "b" in mode.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_texts_are_opened_with_their_encoding(file):
    assert not unspecified(file.read_text(encoding="utf-8")), "give encoding='utf-8'"


@pytest.mark.parametrize("line", ["open(x)", "open(x, 'w')", "p.open()", "p.open('a')", "p.read_text()",
                                  "p.write_text(text)", "open(x, mode='r')", "os.fdopen(handle, 'w')",
                                  "tempfile.NamedTemporaryFile('w')", "io.TextIOWrapper(stream)", "open(x, mode)"])
def test_a_call_without_encoding_is_found(line):
    assert unspecified(line) == [1]


@pytest.mark.parametrize("line", ["open(x, 'rb')", "p.open('wb')", "p.read_text('utf-8-sig')", "p.read_bytes()",
                                  "p.write_text(text, encoding='utf-8')", "open(x, encoding='utf-8')",
                                  "open(x, mode='ab')", "tempfile.TemporaryFile()", "archive.open(name)"])
def test_a_call_with_encoding_or_bytes_is_not(line):
    assert not unspecified(line)
