"""What the compiled programs hold in memory: no logits of all positions, nothing twice."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pretraining import config as config_lib
from pretraining import hlo, random
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.data import tokenizer

# B x L x V / 2 is more than any parameter or table of scores has, and far more than what the
# recipes' heads see of the L positions.
B, L, V = 16, 64, 2048
SMALL = {
    "data.sequence_length": L,
    "tokenizer.size": V,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "model.logits_chunk": 8,
    "train.batch_size": B,
    "train.ema": 0.9,
    "evaluate.batch_size": B,
}
OBJECTIVES = config_lib.objective_names()


# The machine code is of no interest here, and takes most of the time of a compilation.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def built(name, overrides):
    config = config_lib.load(f"configs/{name}.py:tiny", SMALL | overrides)
    config = config_lib.without_epochs(config)
    vocabulary = tokenizer.stand_in(config.tokenizer.size)
    program = program_lib.build(config, vocabulary, jax.devices()[:1])
    return program, config, state_lib.empty_rows(config, config.train.batch_size)


@functools.cache
def compiled_update(name, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    program, config, rows = built(name, overrides)
    with jax.set_mesh(program.mesh):
        lowered = program_lib.jit_update(program, config).lower(program.state, rows, program.seeds)
    return lowered.compile(QUICK), program.state


def compiled_evaluation(name):
    program, _, rows = built(name, {})
    evaluate = jax.jit(step_lib.evaluation_step(program.objective))
    with jax.set_mesh(program.mesh):
        lowered = evaluate.lower(program.state.params, rows, program.seeds)
    return lowered.compile(QUICK), program.state


def assert_no_logits_of_half_the_positions(compiled, state):
    limit = B * L * V // 2
    assert max(leaf.size for leaf in jax.tree.leaves(state)) < limit
    found = hlo.buffers(hlo.parse(compiled.as_text()))
    too_large = {(array, i.opcode, i.name) for array, i in found if array.elements >= limit}
    assert not too_large


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_buffer_of_a_training_step_holds_logits_of_half_the_positions(name):
    assert_no_logits_of_half_the_positions(*compiled_update(name))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_buffer_of_an_evaluation_step_holds_logits_of_half_the_positions(name):
    assert_no_logits_of_half_the_positions(*compiled_evaluation(name))


def test_logits_of_all_positions_would_be_seen():
    with pytest.raises(AssertionError, match=rf"shape=\({B}, {L - 3}, {V}\)"):
        assert_no_logits_of_half_the_positions(*compiled_update("causal_lm", model__logits_chunk=L))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_leaf_of_the_state_is_donated(name):
    compiled, state = compiled_update(name)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
def test_rematerialization_keeps_less_for_the_backward_pass(execution, dtype):
    """Bytes that the forward pass hands on: what a CPU's compiler makes of them tells nothing."""
    policies = ("none", "dots", "outputs", "full")
    sizes = [residuals(execution, dtype, policy) for policy in policies]
    assert sizes == sorted(set(sizes), reverse=True)


def residuals(execution, dtype, policy):
    overrides = {"model.execution": execution, "model.dtype": dtype, "model.remat": policy}
    program, config, rows = built("causal_lm", overrides)
    objective, state = program.objective, program.state
    seeds = random.seeds(config)
    examples, knobs, key = step_lib.inputs(objective, seeds, jnp.zeros((), jnp.int32), rows)

    def loss(params):
        return step_lib.total(
            objective.loss(objective.model.apply, params, examples, knobs, key, True)
        )

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], state.params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def temporaries(**overrides):
    compiled, _ = compiled_update(
        "causal_lm", **{"model__layers": 1, "train__ema": 0.0} | overrides
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_accumulation_takes_less_memory():
    small = dict(tokenizer__size=64, model__mlp_width=256)
    assert temporaries(**small, train__accumulation=4) < temporaries(**small) / 2


def test_logits_in_chunks_take_less_memory():
    assert temporaries() < temporaries(model__logits_chunk=L) / 2
