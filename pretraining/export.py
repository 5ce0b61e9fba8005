"""Writes a run in the layout of `transformers`, for its from_pretrained.

    python -m pretraining.export --workdir=runs/mlm --output=hf/

Every network of the objective becomes a folder with config.json, model.safetensors and a tokenizer
for AutoTokenizer; where there is more than one, each is a subfolder. Nothing appears at --output
before what was written has been read back and compared: the parameters bit for bit, and, where
torch and transformers are installed, the class's own logits and ids with those of this run.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.export",
        __doc__,
        with_config=False,
        workdir="required: folder of the run",
        output="required: folder to write; must be new or empty",
        step="a checkpoint of the run instead of the newest",
        ema="flag: the moving average of the parameters",
    )

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
from flax import traverse_util

from pretraining import config as config_lib
from pretraining import notebook, run_folder
from pretraining.errors import UserError
from pretraining.hugging_face import architectures, checks, folder, tokenizers, weights

PROVENANCE = "pretraining.json"


def main(workdir: str, output: str, step: str | None, ema: bool) -> None:
    """The command."""
    run = notebook.load(workdir, cli.number("step", step, None), ema)
    print("\n".join(export(run, output, ema)))


def export(run: notebook.Run, output: str | pathlib.Path, ema: bool = False) -> list[str]:
    """Writes the networks of a run's objective under `output`; returns what was done and checked.

    Args:
      ema: whether `run.params` are the moving average, for the record.

    Raises:
      UserError: no class of transformers holds any of the networks, `output` is not empty or
        cannot be written, or a check fails; then there is no `output`.
    """
    objective = _objective(run)
    if not objective.hugging_face or objective.query is None:
        raise UserError("export is not available: no class of transformers holds this objective")
    output = run_folder.locate(output, "output")
    with _new_folder(output) as built:
        lines = _write_networks(run, objective, built, ema)
    return [*lines, f"written to {output}"]


@contextlib.contextmanager
def _new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `output` that becomes it at the end; after an error nothing is left."""
    made = []
    try:
        is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        if output.is_symlink() or not is_free:
            raise UserError(f"--output={output} exists and is not an empty folder")
        made = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
            yield pathlib.Path(temporary) / "export"
            os.replace(pathlib.Path(temporary) / "export", output)
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):  # it is not there, or in use by now
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"--output={output} cannot be written: {reason}") from None
        raise


def _write_networks(run, objective, place: pathlib.Path, ema: bool) -> list[str]:
    """Writes and checks the networks that a class can hold; UserError where there is none."""
    lines, written = [], 0
    sample = checks.sample(objective, run.vocabulary, run.payload)
    for key, network in objective.hugging_face.items():
        try:
            name = _choose(run, network)
        except UserError as error:
            lines.append(f"{key or 'the network'} is not written: {error}")
            continue
        written += 1
        _write(run, network, name, sample, place / key, ema)
        lines.append(f"{name}{f' in {key}/' if key else ''}:")
        if network.left_out:
            lines.append(f"  left out, because the class has no place for it: {network.left_out}")
        found = checks.check(place / key, name, objective, network, run.params, sample)
        lines += [f"  {line}" for line in found]
    if not written:
        raise UserError("; ".join(lines))
    return lines


def _objective(run: notebook.Run):
    """In float32, as the written model computes."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = "float32"
    return config_lib.build_objective(config, run.vocabulary)


def _choose(run, network) -> str:
    params = traverse_util.flatten_dict(network.take(run.params), sep="/")
    pad = run.vocabulary.pad
    return architectures.choose(network.architectures, network.config, pad, params.keys())


def _write(run, network, name: str, sample, place: pathlib.Path, ema: bool) -> None:
    params = traverse_util.flatten_dict(jax.device_get(network.take(run.params)), sep="/")
    entries = architectures.ARCHITECTURES[name].weights(network.config)
    tensors = weights.to_tensors(entries, params, network.config)
    folder.write(place, architectures.describe(name, network.config, run.vocabulary), tensors)
    tokenizers.write(
        place,
        run.vocabulary,
        sample.before,
        sample.after,
        max_length=run.config.data.sequence_length,
        segments=network.config.segments > 1 or bool(sample.types),
        texts=sample.texts,
    )
    if sample.types:
        _write_types(place / "tokenizer.json", sample.types)
    record = {
        "step": run.step,
        "moving_average": ema,
        "left_out": network.left_out,
        "config": run.config.to_dict(),
        "provenance": run_folder.provenance(run.folder, -1),
    }
    (place / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n")


def _write_types(file: pathlib.Path, types: dict[int, int]) -> None:
    """Gives tokens of the frame a segment type of their own: XLNet's [CLS] is of type 2."""
    content = json.loads(file.read_text())
    frame = content["post_processor"]
    ids = {name: token["ids"][0] for name, token in frame["special_tokens"].items()}
    for item in [*frame["single"], *frame["pair"]]:
        if special := item.get("SpecialToken"):
            special["type_id"] = types.get(ids[special["id"]], special["type_id"])
    file.write_text(json.dumps(content, ensure_ascii=False))
