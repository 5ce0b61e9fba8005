"""Every objective's training step lowers for accelerators that are not here."""

import collections
import re

import jax
import pytest
from jax import export

from pretraining import config as config_lib
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.data import tokenizer

SMALL = {
    "data.sequence_length": 32,
    "tokenizer.size": 300,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.dtype": "bfloat16",
    "model.execution": "scanned",
    "train.batch_size": 8,
    "train.accumulation": 2,
    "train.ema": 0.9,
}


def exported_step(name):
    config = config_lib.load(f"configs/{name}.py:tiny", SMALL)
    vocabulary = tokenizer.stand_in(config.tokenizer.size)
    config = config_lib.without_epochs(config)
    program = program_lib.build(config, vocabulary, jax.devices()[:1])
    rows = state_lib.empty_rows(config, config.train.batch_size)
    with jax.set_mesh(program.mesh):
        update = program_lib.jit_update(program, config)
        return export.export(update, platforms=("tpu", "cuda"))(program.state, rows, program.seeds)


@pytest.mark.parametrize("name", config_lib.objective_names())
def test_the_step_lowers_to_standard_operations(name):
    exported = exported_step(name)
    assert exported.platforms == ("tpu", "cuda")
    text = exported.mlir_module()
    assert "stablehlo.dot_general" in text
    # A call of Python from the device, or of a library, would stand here.
    assert re.findall(r"custom_call[^\n]*", text) == []


def gradient_operations(name, execution, layers) -> collections.Counter:
    """How often each operation stands in the gradient of the loss."""
    sizes = SMALL | {"model.execution": execution, "model.layers": layers}
    config = config_lib.load(f"configs/{name}.py:tiny", sizes)
    objective = config_lib.build_objective(config, tokenizer.stand_in(config.tokenizer.size))

    def gradient(params, rows, key):
        knobs = objective.evaluation_knobs
        examples = state_lib.corrupt_rows(objective, key, rows, knobs)
        return step_lib.gradients(objective, params, examples, knobs, key, 1)[0]

    params = jax.eval_shape(lambda: state_lib.init_params(objective, config))
    lowered = jax.jit(gradient).lower(params, state_lib.empty_rows(config, 8), jax.random.key(0))
    return collections.Counter(re.findall(r"stablehlo\.(\w+)", lowered.as_text()))


# Products of a layer, forward and backward: one, and two. Of two streams: query, key and value of
# the one, query of the other, distances, which no gradient goes on from; and of each out, up, down,
# the mix, and scores by content, distance and segment.
PRODUCTS = {"masked_lm": 6 * 3, "permutation_lm": (3 + 2 * 7) * 3 - 1}


@pytest.mark.parametrize("name", PRODUCTS)
def test_scanned_layers_are_lowered_once(name):
    """A layer more adds what puts its parameters to the others and takes its gradients out."""
    moves = {"broadcast_in_dim", "concatenate", "reshape", "slice"}
    more = gradient_operations(name, "scanned", 8) - gradient_operations(name, "scanned", 4)
    assert set(more) <= moves
    assert more["slice"] > 0
    more = gradient_operations(name, "unrolled", 8) - gradient_operations(name, "unrolled", 4)
    assert more["dot_general"] == 4 * PRODUCTS[name]


def lowered_texts(seeds):
    """Of the initialisation, the update and the evaluation of a config with these seeds."""
    config = config_lib.load("configs/replaced_token_detection.py:tiny", SMALL | seeds)
    vocabulary = tokenizer.stand_in(config.tokenizer.size)
    config = config_lib.without_epochs(config)
    program = program_lib.build(config, vocabulary, jax.devices()[:1])
    create = state_lib.jit_init(program.objective, program.optimizer, config, program.mesh)
    rows = state_lib.empty_rows(config, config.train.batch_size)
    terms = jax.jit(step_lib.evaluation_step(program.objective))
    with jax.set_mesh(program.mesh):
        lowered = (
            create.lower(program.seeds.init),
            program_lib.jit_update(program, config).lower(program.state, rows, program.seeds),
            terms.lower(program.state.params, rows, program.seeds),
        )
        return [each.as_text() for each in lowered]


def test_runs_that_differ_in_seeds_share_their_programs():
    """The cache of compiled programs goes by this text."""
    other = {"init": 1, "data": 2, "corruption": 3, "dropout": 2**32 - 1, "evaluation": 4}
    seeds = {f"seed.{name}": value for name, value in other.items()}
    assert lowered_texts(seeds) == lowered_texts({})
