"""Names, shapes and settings: what the classes of `transformers` hold, and what they cannot."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from pretraining.errors import UserError
from pretraining.hugging_face import architectures, folder, load, weights
from pretraining.models.config import TransformerConfig

V, L, D, H, F = 11, 16, 6, 2, 5
SMALL = dict(layers=1, width=D, heads=H, mlp_width=F)
GPT2 = dict(norm_order="pre", embedding_norm=False, head_transform=False, head_bias=False)
XLNET = dict(position="relative", embedding_norm=False, head_transform=False)
FITTING = {
    "BertForMaskedLM": {},
    "BertForPreTraining": dict(segments=2),
    "BertLMHeadModel": {},
    "RobertaForMaskedLM": dict(position_offset=1, position_rows=20, activation="gelu_erf"),
    "ElectraForMaskedLM": dict(embedding_width=4, activation="gelu_erf", segments=2),
    "ElectraForPreTraining": dict(embedding_width=4, segments=2),
    "GPT2LMHeadModel": GPT2,
    "XLNetLMHeadModel": XLNET,
}


def make_config(**changes):
    return TransformerConfig.create(base.model() | SMALL | changes, V, L)


def random_params(name, config):
    entries = list(architectures.ARCHITECTURES[name].weights(config))
    shapes = {
        p: weights._shape(e.axes.split(" -> ")[0], weights._sizes(config))
        for e in entries
        for p in e.ours
    }
    rng = np.random.default_rng(0)
    return entries, {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}


# The map.


def test_a_projection_of_heads_by_hand():
    """torch computes weight @ x + bias, with the heads one below the other."""
    config = make_config()
    rng = np.random.default_rng(0)
    kernel, bias, x = (
        rng.normal(size=(D, H, D // H)),
        rng.normal(size=(H, D // H)),
        rng.normal(size=D),
    )
    entries = list(weights._linear("theirs", "ours", "D", "H d"))
    theirs = weights.to_tensors(entries, {"ours/kernel": kernel, "ours/bias": bias}, config)
    for head in range(H):
        rows = slice(head * D // H, (head + 1) * D // H)
        ours = x @ kernel[:, head] + bias[head]
        np.testing.assert_allclose(
            (theirs["theirs.weight"] @ x + theirs["theirs.bias"])[rows], ours
        )


def test_gpt2_has_query_key_and_value_in_one_matrix():
    config = make_config(**GPT2)
    entries, params = random_params("GPT2LMHeadModel", config)
    tensors = weights.to_tensors(entries, params, config)
    joint = tensors["transformer.h.0.attn.c_attn.weight"]
    assert joint.shape == (D, 3 * D)
    for place, name in enumerate(("query", "key", "value")):
        kernel = params[f"encoder/layer_0/attention/{name}/kernel"]
        np.testing.assert_array_equal(joint[:, place * D : (place + 1) * D], kernel.reshape(D, D))


@pytest.mark.parametrize("name", FITTING)
def test_the_map_can_be_inverted_and_is_written_as_memory_lies(name):
    config = make_config(**FITTING[name])
    entries, params = random_params(name, config)
    tensors = weights.to_tensors(entries, params, config)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    back = weights.to_params(entries, tensors, config)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value)
    twice = weights.to_tensors(entries, {p: 2 * x for p, x in params.items()}, config)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(twice[key], 2 * tensor)


def test_what_a_network_lacks_is_zero_and_only_zero_comes_back_as_lacking():
    config = make_config(segments=0)
    entries, params = random_params("BertForMaskedLM", config)
    table = "encoder/embeddings/segment/embedding"
    del params[table]
    tensors = weights.to_tensors(entries, params, config)
    written = tensors["bert.embeddings.token_type_embeddings.weight"]
    assert written.shape == (1, D)
    assert not written.any()
    assert weights.to_params(entries, tensors, config, {table}).keys() == params.keys()
    written[0, 0] = 1e-30
    assert table in weights.to_params(entries, tensors, config, {table})
    del params["encoder/layer_0/mlp/up/kernel"]
    with pytest.raises(KeyError):
        weights.to_tensors(entries, params, config)


def test_a_tensor_of_another_shape_is_named():
    config = make_config()
    entries, params = random_params("BertForMaskedLM", config)
    tensors = weights.to_tensors(entries, params, config)
    tensors["cls.predictions.bias"] = np.zeros(V + 1, np.float32)
    with pytest.raises(UserError, match=r"cls.predictions.bias.*\(12,\) instead of \(11,\)"):
        weights.to_params(entries, tensors, config)


# The classes.


@pytest.mark.parametrize("name", FITTING)
def test_settings_are_what_was_described(name):
    """config.json says all that the network is, in words that the class reads back."""
    config = make_config(**FITTING[name])
    vocabulary = SimpleNamespace(pad=0, bos=2, eos=3)
    written = json.loads(json.dumps(architectures.describe(name, config, vocabulary)))
    found = architectures.settings(name, written)
    expected = {key: getattr(config, key) for key in found}
    assert found == expected | ({"segments": 1} if found["segments"] == 1 else {})
    assert {"layers", "width", "heads", "mlp_width", "activation", "norm"} <= found.keys()


def test_a_sparse_config_means_the_defaults_of_the_class():
    """bert-base, roberta-base and gpt2 as their files say it."""
    bert = architectures.settings("BertForMaskedLM", {"model_type": "bert"})
    assert (bert["width"], bert["layers"], bert["activation"]) == (768, 12, "gelu_erf")
    assert (bert["segments"], bert["position_rows"], bert["norm_epsilon"]) == (2, 512, 1e-12)
    roberta = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    roberta = architectures.settings("RobertaForMaskedLM", roberta)
    assert (roberta["position_offset"], roberta["position_rows"]) == (2, 514)
    gpt2 = architectures.settings("GPT2LMHeadModel", {"n_embd": 1024, "n_head": 16})
    assert (gpt2["mlp_width"], gpt2["activation"], gpt2["norm_epsilon"]) == (
        4096,
        "gelu_tanh",
        1e-5,
    )


@pytest.mark.parametrize(
    "name, written, message",
    [
        ("BertForMaskedLM", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("BertForMaskedLM", {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ("RobertaForMaskedLM", {"hidden_act": "relu"}, "relu"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
        ("XLNetLMHeadModel", {"attn_type": "uni"}, "uni"),
        ("BertForMaskedLM", {"is_decoder": True}, "is_decoder=True: it sees the left alone"),
        ("BertLMHeadModel", {}, "is_decoder=False: it sees both sides"),
        ("BertForMaskedLM", {"hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\]"),
        ("BertForMaskedLM", {"max_position_embeddings": "512"}, "max_position_embeddings='512'"),
        ("RobertaForMaskedLM", {"pad_token_id": "1"}, "pad_token_id='1'"),
        ("GPT2LMHeadModel", {"n_embd": None}, "n_embd=None"),
    ],
)
def test_what_no_network_here_can_be_is_refused(name, written, message):
    with pytest.raises(UserError, match=message):
        architectures.settings(name, written)


@pytest.mark.parametrize(
    "name, changes, reasons",
    [
        ("BertForMaskedLM", dict(norm="rmsnorm", gated=True), ["norm='rmsnorm'", "gated=True"]),
        ("BertForMaskedLM", dict(position="rotary", heads=3), ["position='rotary'"]),
        ("BertForMaskedLM", dict(position="none"), ["position='none'"]),
        ("BertForMaskedLM", dict(embedding_width=4), ["embedding_width=4"]),
        ("BertForMaskedLM", dict(norm_order="pre"), ["norm_order='pre'"]),
        ("BertForMaskedLM", dict(position_offset=1, position_rows=20), ["position_offset=1"]),
        (
            "RobertaForMaskedLM",
            dict(position_offset=2, position_rows=20),
            ["position_offset=2, not 1"],
        ),
        ("RobertaForMaskedLM", dict(activation="gelu_tanh"), ["gelu_erf"]),
        ("ElectraForMaskedLM", dict(activation="gelu_tanh"), ["gelu_erf"]),
        ("GPT2LMHeadModel", dict(norm_order="post"), ["norm_order='post'"]),
        ("GPT2LMHeadModel", dict(segments=2), ["segments=2"]),
        ("XLNetLMHeadModel", dict(embedding_norm=True), ["embedding_norm=True"]),
    ],
)
def test_networks_that_a_class_cannot_hold_are_refused_with_the_reasons(name, changes, reasons):
    config = make_config(**FITTING[name] | changes)
    with pytest.raises(UserError) as caught:
        architectures.choose([name], config, 0, [])
    for reason in reasons:
        assert reason in str(caught.value)


def test_the_first_class_that_fits_is_chosen_and_every_parameter_has_a_place():
    names = ("BertForMaskedLM", "RobertaForMaskedLM")
    for name in names:
        config = make_config(**FITTING[name])
        paths = random_params(name, config)[1].keys()
        assert architectures.choose(names, config, 0, paths) == name
        with pytest.raises(UserError, match="no place for encoder/layer_0/extra"):
            architectures.choose(names, config, 0, [*paths, "encoder/layer_0/extra"])
        with pytest.raises(UserError, match="wants head/norm/scale"):
            architectures.choose(names, config, 0, paths - {"head/norm/scale"})


def test_the_next_sentence_head_goes_where_there_is_room_for_it():
    config = make_config(segments=2)
    paths = random_params("BertForPreTraining", config)[1].keys()
    assert {"pooler/kernel", "next_sentence/kernel"} <= paths
    names = ("BertForMaskedLM", "BertForPreTraining")
    assert architectures.choose(names, config, 0, paths) == "BertForPreTraining"
    plain = [path for path in paths if path.startswith(("encoder", "head"))]
    assert architectures.choose(names, config, 0, plain) == "BertForMaskedLM"


# The folder.


def write(place, name, config, changes=lambda tensors: tensors, **more):
    entries, params = random_params(name, config)
    vocabulary = SimpleNamespace(pad=0, bos=2, eos=3)
    written = architectures.describe(name, config, vocabulary) | more
    folder.write(place, written, changes(weights.to_tensors(entries, params, config)))
    return params


def network(config, *names):
    return SimpleNamespace(architectures=names, config=config)


def read(place, config, *names, paths):
    networks = {"": network(config, *names)}
    return load.read(load.match(place, networks)[""], networks[""], dict.fromkeys(paths))


def only_encoder(tensors):
    return {k.removeprefix("bert."): x for k, x in tensors.items() if k.startswith("bert.")}


def old_names(tensors):
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    position = np.arange(L)[None]
    return tensors | {"bert.embeddings.position_ids": position.astype(np.int64)}


@pytest.mark.parametrize("changes", [lambda tensors: tensors, old_names])
def test_a_pretraining_folder_is_read_into_a_masked_language_model(changes, tmp_path):
    config = make_config(segments=2)
    params = write(tmp_path / "hf", "BertForPreTraining", config, changes)
    paths = {path for path in params if path.startswith(("encoder", "head"))}
    found, notes = read(tmp_path / "hf", config, "BertForMaskedLM", paths=paths)
    assert found.keys() == paths
    for path in paths:
        np.testing.assert_array_equal(found[path], params[path])
    assert len(notes) == 1
    assert "bert.pooler.dense.weight" in notes[0]
    assert "cls.seq_relationship.bias" in notes[0]


def test_a_bare_encoder_leaves_the_head_new(tmp_path):
    config = make_config(segments=2)
    params = write(
        tmp_path / "hf", "BertForMaskedLM", config, only_encoder, architectures=["BertModel"]
    )
    found, notes = read(tmp_path / "hf", config, "BertForMaskedLM", paths=params)
    assert found.keys() == {path for path in params if path.startswith("encoder")}
    np.testing.assert_array_equal(
        found["encoder/layer_0/mlp/up/kernel"], params["encoder/layer_0/mlp/up/kernel"]
    )
    assert notes == ["no head: it starts anew"]


def test_half_precision_and_several_files(tmp_path):
    import ml_dtypes
    from safetensors.numpy import save_file

    config, place = make_config(segments=2), tmp_path / "hf"
    params = write(place, "BertForMaskedLM", config)
    tensors = folder.read_tensors(place)
    (place / folder.TENSORS).unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, kept in files.items():
        save_file({n: tensors[n].astype(ml_dtypes.bfloat16) for n in kept}, place / file)
    weight_map = {name: file for file, kept in files.items() for name in kept}
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found, _ = read(place, config, "BertForMaskedLM", paths=params)
    assert found.keys() == params.keys()
    for path, value in params.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], value.astype(ml_dtypes.bfloat16))


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_(name):
    return lambda tensors: tensors | {name: np.ones(1, np.float32)}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            without("bert.encoder.layer.0.output.dense.bias"),
            "lacks the tensors bert.encoder.layer.0",
        ),
        (without("cls.predictions.bias"), "lacks the tensors cls.predictions.bias"),
        (with_("bert.encoder.layer.0.crossattention.self.query.bias"), "without a place here"),
        (with_("bert.encoder.layer.1.output.dense.bias"), "without a place here"),
    ],
)
def test_missing_and_unknown_tensors_are_named(changes, message, tmp_path):
    config = make_config(segments=2)
    params = write(tmp_path / "hf", "BertForMaskedLM", config, changes)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "hf", config, "BertForMaskedLM", paths=params)


def test_segment_types_that_the_network_lacks_must_be_zero(tmp_path):
    config, own = make_config(segments=2), make_config(segments=0)
    params = write(tmp_path / "hf", "BertForMaskedLM", config)
    paths = params.keys() - {"encoder/embeddings/segment/embedding"}
    with pytest.raises(UserError, match=r"wants --config.model.segments=2"):
        read(tmp_path / "hf", own, "BertForMaskedLM", paths=paths)
    zero = lambda t: t | {k: 0 * x for k, x in t.items() if "token_type" in k}
    write(tmp_path / "zero", "BertForMaskedLM", config, zero)
    assert read(tmp_path / "zero", own, "BertForMaskedLM", paths=paths)[0].keys() == paths


def test_differences_are_listed_as_overrides(tmp_path):
    theirs = make_config(segments=2, width=8, layers=2, position_rows=20)
    write(tmp_path / "hf", "BertForMaskedLM", theirs)
    own = dataclasses.replace(make_config(), vocabulary_size=12)
    config = SimpleNamespace(model=base.model() | SMALL)
    with pytest.raises(UserError) as caught:
        load.check(tmp_path / "hf", config, {"": network(own, "BertForMaskedLM")})
    message = str(caught.value)
    for part in ("--config.model.width=8", "--config.model.layers=2", "a tokenizer of 11 ids"):
        assert part in message
    assert "--config.model.position_rows=20" in message
    assert "heads" not in message
    assert "\n" not in message


def test_networks_find_their_places(tmp_path):
    config = make_config(**FITTING["ElectraForMaskedLM"])
    networks = {
        "discriminator": network(config, "ElectraForPreTraining"),
        "generator": network(config, "ElectraForMaskedLM"),
    }
    for key in networks:
        write(tmp_path / "hf" / key, networks[key].architectures[0], config)
    found = load.match(tmp_path / "hf", networks)
    assert {key: place.path.name for key, place in found.items()} == {k: k for k in networks}
    alone = load.match(tmp_path / "hf" / "generator", networks)
    assert list(alone) == ["generator"]
    write(tmp_path / "bare", "ElectraForMaskedLM", config, architectures=["ElectraModel"])
    with pytest.raises(UserError, match="holds ElectraModel; this objective takes"):
        load.match(tmp_path / "bare", networks)
    with pytest.raises(UserError, match="takes GPT2LMHeadModel"):
        load.match(tmp_path / "bare", {"": network(config, "GPT2LMHeadModel")})


def test_a_run_is_no_such_folder_and_old_formats_are_named(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"objective": {}, "model": {}}))
    assert folder.find(run) == []
    write(run / "hf", "BertForMaskedLM", make_config())
    assert folder.find(run) == []  # an export inside a run
    assert folder.find(run / "hf") == [run / "hf"]
    (run / "hf" / folder.TENSORS).rename(run / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model.bin: save it anew"):
        folder.read_tensors(run / "hf")
    (run / "hf" / folder.TENSORS).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        folder.read_tensors(run / "hf")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(content, tmp_path):
    write(tmp_path / "hf", "BertForMaskedLM", make_config())
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(UserError, match=f"cannot read {index}"):
        folder.read_tensors(tmp_path / "hf")


@pytest.mark.parametrize("more", [{"architectures": 3}, {"architectures": [[]]}, {"model_type": 3}])
def test_a_class_that_is_no_name_is_refused(more, tmp_path):
    write(tmp_path / "hf", "BertForMaskedLM", make_config(), **more)
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'hf' / 'config.json'}"):
        folder.find(tmp_path / "hf")


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    write(tmp_path / "hf", "BertForMaskedLM", make_config())
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"0"
    (tmp_path / "hf" / folder.TENSORS).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'hf' / folder.TENSORS}"):
        folder.read_tensors(tmp_path / "hf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "hf", "BertForMaskedLM", make_config())
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: folder.read_tensors(tmp_path / "hf"),
        lambda: folder.write(tmp_path / "new", {}, {}),
    ):
        with pytest.raises(UserError, match="need the package safetensors"):
            call()
