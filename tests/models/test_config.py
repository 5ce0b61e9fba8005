"""TransformerConfig: what it refuses and what its zeros stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import base
from pretraining.errors import UserError
from pretraining.models.attention import Attention
from pretraining.models.transformer import Transformer, TransformerConfig

REFUSED = [
    (dict(heads=3), "config.model.heads=3 must divide config.model.width=16"),
    (dict(position="sinusoidal"), "config.model.position='sinusoidal'"),
    (dict(norm="batchnorm"), "config.model.norm='batchnorm'"),
    (dict(norm_order="sandwich"), "config.model.norm_order='sandwich'"),
    (dict(activation="gelu"), "gelu_tanh, gelu_erf"),
    (dict(dtype="float16"), "config.model.dtype='float16'"),
    (dict(attention="flash"), "config.model.attention='flash'"),
    (dict(execution="loop"), "config.model.execution='loop'"),
    (dict(remat="some"), "config.model.remat='some'"),
    (dict(dropout=1.0), "config.model.dropout=1.0"),
    (dict(attention_dropout=-0.1), "config.model.attention_dropout=-0.1"),
    (dict(layers=0), "config.model.layers=0"),
    (dict(segments=-1), "config.model.segments=-1"),
    (dict(init_std=0.0), "config.model.init_std=0.0"),
    (dict(norm_epsilon=-1e-5), "config.model.norm_epsilon=-1e-05"),
    (dict(position="rotary", width=6), "config.model.width=6 and config.model.heads=2 give 3"),
    (dict(position_rows=8, position_offset=2), "config.model.position_offset=2"),
    (dict(position_rows=4), "config.data.sequence_length=8"),
    (dict(attention="splash"), "config.model.attention_dropout=0.1"),
    (dict(attention="cudnn", attention_dropout=0.0), "config.model.dtype='float32'"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=lambda x: str(x)[:40])
def test_a_contradictory_config_is_refused(make_config, changes, message):
    with pytest.raises(UserError) as error:
        make_config(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_stays_checked_when_it_is_changed(make_config):
    with pytest.raises(UserError, match="must divide"):
        dataclasses.replace(make_config(), heads=5)


def test_zeros_stand_for_another_key(make_config):
    config = make_config(embedding_width=0, position_rows=0, position_init_std=0.0)
    assert (config.embedding_width, config.position_rows) == (16, 8)
    assert config.position_init_std == config.init_std
    assert make_config(embedding_width=4).embedding_width == 4


def test_every_key_of_the_config_is_a_field():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert fields == set(base.model()) | {"vocabulary_size", "sequence_length"}


def test_segments_without_a_table_are_refused(make_config, tokens):
    with pytest.raises(UserError, match="config.model.segments=0"):
        Transformer(make_config()).init(jax.random.key(0), tokens, Attention(), tokens)


def test_more_positions_than_rows_are_refused(make_config):
    tokens = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(UserError, match="config.model.position_rows=8 is too small for 9"):
        Transformer(make_config()).init(jax.random.key(0), tokens, Attention())
