"""What an objective does to a text, in the terminal and as a picture.

    python -m pretraining.show --config=configs/masked_lm.py:tiny --text="A text of a few words."
    python -m pretraining.show --workdir=runs/mlm --text="A text of a few words."

The first shows a model before its first step (which `config.init_from` may name), in the vocabulary
of the Python documentation (that of `config.tokenizer.model` if it names one), which is made once,
in about ten seconds; the second a run's own newest checkpoint. Both show the example that the loss
would read if the text were the first row of the next batch; a generator's samples are drawn without
dropout. Colours where the output is a terminal and NO_COLOR is unset.
"""

import sys

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.show.__main__",
        __doc__,
        # where a recipe is named, or its keys are wanted in the help
        with_config=any(word.split("=")[0] in ("--config", "--help", "-h") for word in sys.argv),
        text="required: what to show, at most a row of the model",
        workdir="folder of a run, instead of --config",
        step="checkpoint (default: the newest); with --config the step of the schedule (default 0)",
        ema="flag: the moving average of a run's parameters",
        seed="of the corruption (default: config.seed.corruption)",
        output="file of the picture (default show.png); its ending says the format",
    )

import os
import pathlib
import shutil

import jax

from pretraining import compilation_cache, init_from, notebook, show, state
from pretraining import config as config_lib
from pretraining.data import prepare
from pretraining.errors import UserError

_SOURCE, _PIECES = "python-docs", 4096  # what every Python has, and what it fills quickly
_DPI = 100


def main(text, output, seed, step, workdir, ema, config=None) -> int:
    """Prints the example and draws it; see the module's docstring."""
    if (config is None) == (workdir is None):
        raise UserError("give one of --config (untrained) and --workdir (a run)")
    if config is not None and ema:
        raise UserError("--ema needs --workdir: without a run there is no moving average")
    step = cli.number("step", step, None)
    seed = cli.number("seed", seed, None)
    run = notebook.load(workdir, step, ema) if workdir else untrained(config, step or 0)
    shown = show.read(run, text, seed)
    width = shutil.get_terminal_size().columns
    print(show.text(shown, width, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    try:
        show.figure(shown).savefig(output or "show.png", dpi=_DPI)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"--output={output}: {error}") from None
    print(f"\nThe picture is in {output or 'show.png'}")
    return 0


def untrained(config, step: int = 0) -> notebook.Run:
    """A Run that has not begun: the parameters of step 0, the masks and knobs of `step`."""
    compilation_cache.use(config.data)
    config = config_lib.without_epochs(init_from.adopt(config, None))
    with config.unlocked():
        config.model.attention = "xla"  # wherever this is, it runs there
    vocabulary = _vocabulary(config)
    objective = config_lib.build_objective(config, vocabulary)
    params = jax.jit(lambda: state.init_params(objective, config))()
    if config.init_from:
        params = init_from.parameters(config, params, vocabulary)
    return notebook.Run(pathlib.Path(), config, vocabulary, objective, params, step)


def _vocabulary(config):
    """With the counts of Python's documentation; its pieces too, unless a model is named."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.corpus = _SOURCE
        config.evaluate.sets = ()
        config.tokenizer.size = min(config.tokenizer.size, _PIECES)
    vocabulary = prepare.prepare(config).vocabulary
    origin = config.tokenizer.model or f"{_SOURCE}; others by --config.tokenizer.model or --workdir"
    print(f"vocabulary: {vocabulary.size:,} pieces of {origin}", file=sys.stderr)
    return vocabulary
