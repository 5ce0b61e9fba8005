"""The project's side of `experiments.speed.peers`: the step and the loader of a training run."""

import pathlib

import jax

from configs import causal_lm
from experiments.speed.sides import worker
from experiments.speed.sides.worker import Side, Task
from pretraining import config as config_lib
from pretraining import flops, sharding
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining.data import loader, store

# In what configs/<objective>.py:small differs from the class of transformers; the size apart.
LIKE_PEER = {
    "masked_lm": {"model.segments": 2},
    "causal_lm": {f"model.{key}": value for key, value in causal_lm.GPT2.items()},
    "replaced_token_detection": {"model.segments": 2},
    "permutation_lm": {},
}


def make_config(task: Task):
    """The small recipe of the objective, at the sizes of the task."""
    sizes = {key: getattr(task, key) for key in ("layers", "width", "heads", "mlp_width")}
    dropout = {"dropout": task.dropout, "attention_dropout": task.dropout}
    overrides = {f"model.{key}": value for key, value in (sizes | dropout).items()}
    overrides |= {
        "tokenizer.size": task.vocabulary_size,
        "train.batch_size": task.batch_size,
        "data.sequence_length": task.sequence_length,
    }
    recipe = f"configs/{task.objective}.py:small"
    return config_lib.load(recipe, overrides | LIKE_PEER[task.objective])


def start(task: Task) -> Side:
    """The compiled update, the loader on the task's store, and the FLOPs of a step."""
    tokens = store.open_store(pathlib.Path(task.folder) / "store")
    config = config_lib.without_epochs(make_config(task))
    batches = loader.train_batches(((tokens, 1.0),), config, 0)
    program = program_lib.build(config, tokens.vocabulary)
    compiled = program_lib.compile_update(program, config)
    state = state_lib.init(program.objective, program.optimizer, config, program.mesh)

    def take():
        return sharding.put_rows(next(batches), program.mesh, task.batch_size)

    def update(rows) -> float:
        nonlocal state
        state, figures = jax.block_until_ready(compiled(state, rows, program.seeds))
        return float(figures["loss"])

    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "flops": flops.step_flops(config, tokens.vocabulary),
    }
    return Side(facts, take, update, lambda: flops.peak_flops(config))


if __name__ == "__main__":
    worker.serve(start)
