"""Networks of an objective from a folder of `transformers`."""

import dataclasses
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from pretraining.errors import UserError
from pretraining.hugging_face import architectures, folder, weights
from pretraining.models.config import TransformerConfig


class Found(NamedTuple):
    """A network of the objective that a folder holds.

    Attributes:
      path: the folder.
      name: the class of `transformers` by whose names its tensors are read.
      settings: values of TransformerConfig that its config.json means.
    """

    path: pathlib.Path
    name: str
    settings: dict[str, Any]


def match(path: pathlib.Path, networks: dict[str, Any]) -> dict[str, Found]:
    """{key of `networks`: what the folder holds of it}.

    Args:
      path: one network, or a folder of several.
      networks: `Objective.hugging_face`.

    Raises:
      UserError: one has no place in the objective, or could be any of several.
    """
    found = {}
    for place in folder.find(path):
        written = folder.read_config(place)
        key, name = _place(place, written, networks)
        if key in found:
            raise UserError(f"{found[key].path} and {place} are the same network of the objective")
        try:
            found[key] = Found(place, name, architectures.settings(name, written))
        except UserError as error:
            raise UserError(f"{place} cannot be read: {error}") from None
    return found


def _place(place, written, networks) -> tuple[str, str]:
    """(key, class) of the network that a config.json describes."""
    classes = {name: key for key, network in networks.items() for name in network.architectures}
    for name in written.get("architectures") or ():
        if name in classes:
            return classes[name], name
    kind = written["model_type"]
    alike = {
        name: key
        for name, key in classes.items()
        if architectures.ARCHITECTURES[name].model_type == kind
    }
    if len(set(alike.values())) == 1:
        name = next(iter(alike))
        return alike[name], name
    holds = ", ".join(written.get("architectures") or [kind])
    wanted = ", ".join(classes) or "nothing"
    raise UserError(f"{place} holds {holds}; this objective takes {wanted}")


def check(path: pathlib.Path, config, networks: dict[str, Any]) -> None:
    """Refuses a folder whose networks have other sizes than those of the config.

    Raises:
      UserError: with every difference, as the overrides to type.
    """
    wrong = []
    for key, found in match(path, networks).items():
        own = networks[key].config
        main = TransformerConfig.create(config.model, own.vocabulary_size, own.sequence_length)
        settings = {
            name: value for name, value in found.settings.items() if _differs(name, value, own)
        }
        pattern = "--config.model.{}={}" if own == main else key + ": {}={}"
        if (size := settings.pop("vocabulary_size", None)) is not None:
            wrong.append(f"a tokenizer of {size} ids instead of {own.vocabulary_size}")
        wrong += [pattern.format(name, value) for name, value in settings.items()]
    if wrong:
        raise UserError(f"config.init_from={str(path)!r} holds another network: {' '.join(wrong)}")


def _differs(name: str, value: Any, config: TransformerConfig) -> bool:
    own = getattr(config, name)
    if name == "position_rows":  # more of them are new ones
        return own < value
    if name == "segments":  # whether a table that the network lacks is zero, `read` sees
        return own not in (0, value)
    return own != value


def read(found: Found, network: Any, params: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a network, as far as the folder holds them.

    Args:
      found: of `match`, which `check` has passed.
      network: of `Objective.hugging_face`.
      params: {path: leaf} of the network; only its paths are read.

    Returns:
      ({path: float32 array}: the encoder and, unless the folder has nothing of it, the head; what
      is to be said about it).

    Raises:
      UserError: tensors are missing, left over inside the encoder or of another shape, or the
        network has no place for what they hold.
    """
    architecture = architectures.ARCHITECTURES[found.name]
    # Positions may grow afterwards, and no kernel runs here.
    config = dataclasses.replace(
        network.config, **found.settings, sequence_length=1, attention="xla"
    )
    tensors = _canonical(folder.read_tensors(found.path), architecture.prefix)
    entries = list(architecture.weights(config))
    fresh = {_part(entry) for entry in entries} - {
        _part(entry) for entry in entries if entry.theirs in tensors
    }
    entries = [entry for entry in entries if _part(entry) not in fresh]
    notes = [f"no {part}: it starts anew" for part in sorted(fresh)]
    notes += _check_tensors(found, tensors, entries, config)
    lacking = {path for entry in entries for path in entry.ours} - params.keys()
    values = weights.to_params(entries, tensors, config, lacking)
    if homeless := sorted(values.keys() & lacking):
        wanted = "; ".join(_hint(path, found.settings) for path in homeless)
        raise UserError(f"{found.path} holds more than the network: {wanted}")
    return values, notes


def _part(entry: weights.Weight) -> str:
    return entry.ours[0].split("/")[0]


def _canonical(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Names of today: old files say gamma and beta, those of a bare encoder lack its prefix."""
    missing = "" if any(name.startswith(f"{prefix}.") for name in tensors) else f"{prefix}."
    rename = lambda name: re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    return {
        missing + rename(re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)): tensor
        for name, tensor in tensors.items()
    }


# No parameters: positions, masks and constants that old versions saved.
_BUFFERS = re.compile(r"position_ids$|token_type_ids$|\.attn\.(masked_)?bias$")


def _check_tensors(found, tensors, entries, config) -> list[str]:
    """Refuses tensors that are missing, unknown or of another shape; what is left out is said."""
    architecture = architectures.ARCHITECTURES[found.name]
    wanted = {entry.theirs for entry in entries}
    missing = sorted(wanted - tensors.keys())
    wrong = [f"it lacks the tensors {', '.join(missing)}"] if missing else []
    wrong += weights.misfits(entries, tensors, config)
    untied = architecture.weights(dataclasses.replace(config, tie_head=False))
    copies = {entry.theirs for entry in untied}  # tied tensors that were saved twice
    left = sorted(n for n in tensors.keys() - wanted - copies if not _BUFFERS.search(n))
    pooler = f"{architecture.prefix}.pooler."
    inside = [n for n in left if n.startswith(f"{architecture.prefix}.") and pooler not in n]
    if inside:
        wrong.append(f"it holds tensors without a place here: {', '.join(inside)}")
    if wrong:
        raise UserError(f"{found.path} does not fit: {'; '.join(wrong)}")
    return [f"left out: {_shorten(left)}"] if left else []


def _hint(path: str, settings: dict[str, Any]) -> str:
    keys = {
        "encoder/embeddings/segment/embedding": f"segments={settings.get('segments')}",
        "head/bias": "head_bias=True",
    }
    return f"{path} wants --config.model.{keys.get(path, 'bias=True')}"


def _shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
