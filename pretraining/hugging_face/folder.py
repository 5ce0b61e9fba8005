"""A folder in the layout of `transformers`: config.json and its tensors, as files."""

import json
import pathlib
from typing import Any

import numpy as np

from pretraining.errors import UserError

CONFIG, TENSORS = "config.json", "model.safetensors"
_INDEX = TENSORS + ".index.json"  # of a model that is written in several files


def find(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders of single networks: `path` itself, or those in it; none = another kind.

    Their config.json names a "model_type", which that of a run does not.
    """
    candidates = [path] if (path / CONFIG).exists() else sorted(path.glob(f"*/{CONFIG}"))
    folders = [c if c.is_dir() else c.parent for c in candidates]
    return [folder for folder in folders if "model_type" in read_config(folder)]


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json; UserError where it is no JSON object, or names its class in no usual way."""
    written = _read_object(folder / CONFIG)
    names = written.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"cannot read {folder / CONFIG}: architectures={names!r}")
    if not isinstance(written.get("model_type", ""), str):
        raise UserError(f"cannot read {folder / CONFIG}: model_type={written['model_type']!r}")
    return written


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        written = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(written, dict):
        raise UserError(f"cannot read {file}: it holds no object")
    return written


def write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors (contiguous arrays) into a new folder.

    Raises:
      UserError: the package safetensors is not installed, or cannot write.
      OSError: the folder cannot be written.
    """
    library = _library()
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    try:
        library.numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    except library.SafetensorError as error:  # its own name for an OSError
        raise UserError(f"cannot write {folder / TENSORS}: {error}") from None


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: float32 array} of all its safetensors files.

    Raises:
      UserError: there are none, one cannot be read, or safetensors is not installed.
    """
    library, tensors = _library(), {}
    for name in _files(folder):
        try:
            tensors |= library.numpy.load_file(folder / name)
        # For a type that numpy lacks the package raises one of the others, by its version.
        except (OSError, library.SafetensorError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from None
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def _files(folder) -> list[str]:
    if (folder / _INDEX).exists():
        files = _read_object(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"cannot read {folder / _INDEX}: it has no weight_map of file names")
        return sorted(set(files.values()))
    if (folder / TENSORS).exists():
        return [TENSORS]
    others = [path.name for path in sorted(folder.glob("*.bin"))]
    instead = f", only {', '.join(others)}: save it anew with save_pretrained" if others else ""
    raise UserError(f"{folder} holds no {TENSORS}{instead}")


def _library():
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(
            "weights of Hugging Face need the package safetensors: "
            "pip install 'pretraining[hugging_face]'"
        ) from None
    return safetensors
