"""Held-out figures: during training, at its end, and of any checkpoint.

    python -m pretraining.evaluate --workdir=runs/mlm [--corpus=...] [--step=N] [--ema]
    python -m pretraining.evaluate --workdir=runs/mlm --suite=yardstick [--tasks=FOLDER]

Prints one JSON object and stores it in <workdir>/evaluations/. `loss` and every term are means over
the validation rows with masks fixed by address; `unigram_loss` (the same tokens under the unigram
distribution of the training split) and `uniform_loss` (log V) make them readable. Where positions
see their left: `perplexity` = exp(the loss term) and bits per byte. Where they see both sides:
`pseudo_perplexity` over a fixed sample of rows, each token masked alone (Salazar et al. 2020).

The suite "yardstick" measures what runs of different objectives are compared by: pretraining/
yardstick/suite.py. It is stored as <step>[-ema]-yardstick-<sample>.json; a later evaluation with
fewer tasks and equal settings leaves the figures of the others where they are.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.evaluate",
        __doc__,
        with_config=False,
        workdir="required: folder of the run",
        corpus="a source (see config.data.corpus) instead of the run's validation split",
        step="checkpoint (default: the newest)",
        ema="flag: the moving average of the parameters",
        rows="rows of the pseudo-perplexity sample (default 8)",
        suite="yardstick: the figures by which runs of different objectives are compared",
        tasks="with --suite: folder of blimp/, glue/ and conll2003/, those of them that are there",
        sample="with --suite: quick (default), or full: slow without an accelerator",
    )

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pretraining import files, metrics, predict, random, run_folder, sharding, step
from pretraining.data import loader, prepare
from pretraining.data.row import SPECIAL_POSITIONS, Row
from pretraining.errors import UserError
from pretraining.yardstick import family


class Evaluator:
    """The evaluation of a run: compiled once, the same rows and masks at every call.

    Args:
      terms: `(params, rows, seeds) -> terms`, such as `step.evaluation_step` builds.
      seeds: its last argument.
    """

    def __init__(self, terms: Callable, seeds: random.Seeds, config, mesh, vocabulary):
        self._config, self._mesh, self._size = config, mesh, vocabulary.size
        self._terms, self._seeds = jax.jit(terms), seeds
        self._places = sharding.local_places(mesh, config.evaluate.batch_size)

    def __call__(self, state, prepared) -> dict[str, float]:
        """{"eval/loss", "eval/<term>", "eval/uniform_loss", "eval/<set>/...", "eval/ema/..."}."""
        figures = self.figures(state.params, prepared.validation, "eval/")
        for name, store in prepared.sets.items():
            figures |= self.figures(state.params, ((store, 1.0),), f"eval/{name}/")
        if state.ema is not None:
            figures |= self.figures(state.ema, prepared.validation, "eval/ema/")
        return figures

    def figures(self, params, stores, prefix: str = "") -> dict[str, float]:
        """The figures of one corpus: tuple of (store, weight)."""
        size = self._config.evaluate.batch_size
        batches = loader.evaluation_batches(
            stores, self._config, self._config.evaluate.rows, size, self._places
        )
        with jax.set_mesh(self._mesh):  # of the activations
            parts = [
                self._terms(params, sharding.put_rows(rows, self._mesh, size), self._seeds)
                for rows in batches
            ]
        figures = self.combine(metrics.fetch(parts)) | {"uniform_loss": math.log(self._size)}
        return {prefix + name: value for name, value in figures.items()}

    def combine(self, parts: list[dict]) -> dict[str, Any]:
        """The figures of the fetched terms of several batches."""
        return combine(parts)


def combine(parts: list[dict]) -> dict[str, float]:
    """{"loss", each term's mean, "tokens"} of the terms of several batches.

    The terms hold Python numbers; `tokens` is the largest weight of a term of the loss.
    """
    figures, loss, tokens = {}, 0.0, 0.0
    for name, term in parts[0].items():
        weight = math.fsum(part[name].weight for part in parts)
        total, denominator = math.fsum(part[name].sum for part in parts), weight + term.smooth
        figures[name] = total / denominator if denominator else 0.0
        loss += term.scale * figures[name]
        tokens = max(tokens, weight if term.scale else 0.0)
    return {"loss": loss} | figures | {"tokens": tokens}


# -------------------------------------------------------------------------------- end of training


def print_summary(folder: pathlib.Path, objective, params, prepared, config) -> None:
    """The last validation figures, three predictions in words, and where everything is.

    On several hosts without the predictions: the parameters don't lie on one of them.
    """
    if jax.process_index() > 0:
        return
    print(f"\n{last(folder)}")
    if objective.query and objective.log_probs and jax.process_count() == 1:
        for text in sample_predictions(objective, params, prepared.vocabulary, prepared, config):
            print(text)
    print(f"\nThe run is in {folder}; read it with pretraining.load({str(folder)!r})")


def last(folder: pathlib.Path) -> str:
    """The last validation figures of a run, one line."""
    lines = [line for line in metrics.read(folder / metrics.FILE) if "eval/loss" in line]
    return f"Validation, {_readable(lines[-1])}" if lines else "Not evaluated yet"


def _readable(line: dict) -> str:
    names = {
        "eval/loss": "loss",
        "eval/unigram_loss": "unigram baseline",
        "eval/uniform_loss": "log V",
        "eval/accuracy": "accuracy",
    }
    figures = [f"{name} {line[key]:.3f}" for key, name in names.items() if key in line]
    return f"step {line['step']}: " + ", ".join(figures)


def sample_predictions(objective, params, vocabulary, prepared, config, count: int = 3):
    """`count` readable predictions, each at one whole-word token of a validation row."""
    (store, _), payload = prepared.validation[0], config.data.sequence_length - SPECIAL_POSITIONS
    total = store.validation.rows(payload)
    for number in sorted({total * i // count for i in range(count)}):
        row = _row(store.validation, number, payload)
        position = _position_to_predict(row, vocabulary)
        if position is not None:
            yield _prediction(objective, params, vocabulary, row, position)


def _row(split, number: int, payload: int) -> Row:
    return Row(*(field[0] for field in split.read([number], payload)))


def _position_to_predict(row: Row, vocabulary) -> int | None:
    """The word near the middle whose token is the longest: more to guess than "the" or a comma."""
    length = int(row.length)
    starts = vocabulary.word_start[row.tokens[:length]]
    whole = (
        starts
        & np.append(starts[1:], False)
        & ~np.isin(row.tokens[:length], vocabulary.special_ids)
    )
    middle = np.arange(length)[length // 3 : 2 * length // 3]
    candidates = middle[whole[middle]]
    if not len(candidates):
        return None
    return int(max(candidates, key=lambda i: vocabulary.bytes_per_id[row.tokens[i]]))


def _prediction(objective, params, vocabulary, row: Row, position: int) -> str:
    values = predict.log_probs(objective, params, [row], np.array([[position]]))[0, 0]
    best = np.argsort(values)[::-1][:4]
    before = vocabulary.decode(row.tokens[max(0, position - 12) : position].tolist())
    truth = vocabulary.decode([int(row.tokens[position])])
    after = ""
    if objective.context == "both":
        after = vocabulary.decode(row.tokens[position + 1 : position + 9].tolist()) + " "
    guesses = ", ".join(f"{vocabulary.decode([int(i)])!r} {math.exp(values[i]):.1%}" for i in best)
    return f"  ...{before} [{truth}] {after}->  {guesses}"


# ---------------------------------------------------------------------------------------- command


def main(
    workdir: str,
    corpus: str | None,
    step: str | None,
    ema: bool,
    rows: str | None,
    suite: str | None,
    tasks: str | None,
    sample: str | None,
) -> int:
    """Evaluates a stored checkpoint; see the module's docstring."""
    from pretraining import notebook
    from pretraining.yardstick import suite as yardstick

    count = cli.number("rows", rows, 8, at_least=1)
    _check_options(suite, {"corpus": corpus, "rows": rows}, {"tasks": tasks, "sample": sample})
    found = yardstick.read(tasks, sample or "quick") if suite else None
    run = notebook.load(workdir, step=cli.number("step", step, None), ema=ema)
    prepared = prepare.prepare_validation(run.config, run.vocabulary, corpus)
    if not corpus:
        run_folder.check_same_data(run.folder, run.config, prepared.fingerprint)
    figures = {"step": run.step, "ema": ema}
    if suite:
        figures |= yardstick.measure(run, prepared, found, sample or "quick")
    else:
        figures |= {"corpus": corpus or "validation"} | _figures(run, prepared, count)
    of_suite = [suite, sample or "quick"] if suite else []
    name = "-".join(filter(None, [str(run.step), "ema" * ema, _slug(corpus or ""), *of_suite]))
    path = pathlib.Path(workdir) / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(yardstick.merge(path, figures) if suite else figures, indent=1)
    files.write_atomically(path, text + "\n")
    print(text)
    return 0


def _check_options(suite: str | None, without: dict, only_with: dict) -> None:
    """Refuses an unknown suite, and options that mean nothing with, or without, a suite."""
    if suite not in (None, "yardstick"):
        raise UserError(f"--suite={suite}: there is no such suite, there is yardstick")
    for name, value in (without if suite else only_with).items():
        if value is not None:
            place = f"with --suite={suite}" if suite else "without --suite=yardstick"
            raise UserError(f"--{name}={value} means nothing {place}")


def _figures(run, prepared, count: int) -> dict[str, float]:
    """The figures of the training loop, on the devices that are here, and the likelihoods."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():  # whatever devices wrote it, those that are here evaluate it
        config.mesh.update(data=-1, fsdp=1, tensor=1)
        rows_per_device = math.ceil(config.evaluate.batch_size / jax.device_count())
        config.evaluate.batch_size = rows_per_device * jax.device_count()
    mesh = sharding.make_mesh(config)
    params = jax.device_put(run.params, sharding.tree_shardings(run.params, mesh))
    terms = step.evaluation_step(run.objective)
    evaluator = Evaluator(terms, random.seeds(config), config, mesh, run.vocabulary)
    figures = evaluator.figures(params, prepared.validation)
    return figures | likelihoods(run, prepared.validation, count, figures["loss"])


def likelihoods(run, stores, rows: int, loss: float) -> dict[str, float]:
    """Perplexity, exact or pseudo, of the kind that the objective's context allows.

    The sample of the pseudo-perplexity is the first `rows` rows of every source.
    """
    if run.objective.query is None:
        return {}
    if run.objective.context == "left":
        return {"perplexity": math.exp(loss)}
    value, count = family.pseudo_perplexity(run, stores, rows)
    return {"pseudo_perplexity": value, "pseudo_perplexity_tokens": count}


def _slug(corpus: str) -> str:
    """The corpus's name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", corpus).strip("_")[-60:]
