"""The plan of a step: figures held against hand counts, advice against what dominates."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import types

import jax
import pytest

from pretraining import config as config_lib
from pretraining import flops, plan, sharding
from pretraining import program as program_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
    "data.sequence_length": 32,
    "tokenizer.size": 320,
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "train.batch_size": 16,
    "train.ema": 0.9,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def recipe(name="causal_lm", **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return config_lib.load(f"configs/{name}.py:tiny", SMALL | overrides)


@pytest.fixture(scope="module")
def small():
    return plan.measure(recipe(), "cpu:8", 0.5)


def test_memory_by_hand(small):
    # Width 32, feed-forward 64, 32 positions, 320 pieces: what tensor shares out is a quarter of
    # itself (tensor x fsdp) on a device, the rest a half (fsdp), but for the inner biases (tensor).
    attention = 3 * (32 * 32 + 32) + 32 * 32
    quarter = 320 * 32 + attention + 2 * 32 * 64
    vectors = 32 + 4 * 32 + 32  # output bias, two norms, feed-forward's output bias
    half = 32 * 32 + 2 * 32 + vectors + (32 * 32 + 32 + 2 * 32 + 320)  # position, norm, head
    inner = 64
    assert small.parameters == quarter + half + inner
    shard = quarter / 4 + half / 2 + inner / 2
    assert small.memory["parameters"] == small.memory["moving average"] == 4 * shard
    # Two moments and optax's counters of four bytes.
    assert 8 * shard <= small.memory["optimizer"] <= 8 * shard + 16
    # 4 rows of 29 tokens, documents (int32) and boundaries (uint8), and 3 int32.
    assert small.memory["batch"] == 4 * (29 * (4 + 4 + 1) + 3 * 4)
    assert small.memory["temporaries"] > 0
    assert small.needed == sum(small.memory.values())


def test_every_parameter_stands_under_one_rule(small):
    names = [name for name, *_ in small.rules]
    assert len(names) == len(set(names))
    rules = {name: rest for name, *rest in small.rules}
    assert rules["encoder/embeddings/token/embedding"][:2] == ["320x32", "tensor, fsdp"]
    assert rules["encoder/layer_*/mlp/up/kernel"][:2] == ["32x64", "fsdp, tensor"]
    assert "mlp/(up|gate)/kernel" in rules["encoder/layer_*/mlp/up/kernel"][2]
    assert rules["encoder/layer_*/mlp_norm/scale"] == ["32", "fsdp", "largest divisible dimension"]


def test_layers_of_one_form_share_a_line():
    described = plan.measure(recipe(model__layers=2, train__ema=0.0), "cpu:8", 0.5)
    assert "encoder/layer_*/mlp/up/kernel (2)" in [name for name, *_ in described.rules]


def test_flops_of_a_token_and_the_collectives_of_a_mesh(small):
    assert small.token_flops * 16 * 29 == pytest.approx(small.step_flops)
    assert small.collectives["all-reduce"].count > 0
    assert small.tokens_per_day is None  # a CPU has no published peak


def test_the_command_prints_and_stores_its_figures(tmp_path, capsys, monkeypatch, small):
    monkeypatch.setattr(plan, "measure", lambda *arguments: small)
    assert plan.main(recipe(), None, None, str(tmp_path / "plan.json")) == 0
    printed = capsys.readouterr().out
    assert "8 x cpu (cpu:8), mesh data=2 x fsdp=2 x tensor=2" in printed
    assert f"parameters      {small.parameters:,}" in printed
    assert json.loads((tmp_path / "plan.json").read_text())["memory"] == small.memory


def test_tokens_of_a_day(small):
    """A chip of 1e12 FLOP/s at a half: 4 devices do 2e12 FLOPs a second."""
    seen = small._replace(tokens_per_day=3.5e9, utilisation=0.5)
    assert "tokens per day  3.500e+09 at 50% of the peak" in plan.report(seen)
    assert plan.tokens_per_day(tokens=1000, step_flops=4e12, peak=4e12, utilisation=0.5) == (
        86_400 * 1000 / 2
    )


def test_a_program_that_does_not_fit_says_what_to_change(small):
    told = small._replace(fits=False, capacity=1.0, advice=["config.mesh.fsdp=4: because"])
    assert plan.report(told).endswith("the most useful first:\n  config.mesh.fsdp=4: because")
    assert "does not fit" in plan.report(told)


GIB = 2**30
MEMORY = {"parameters": 8 * GIB, "optimizer": 16 * GIB, "moving average": 0, "batch": 0}


def make_mesh(data, fsdp, tensor, topology="cpu"):
    topology = f"cpu:{data * fsdp * tensor}" if topology == "cpu" else topology
    config = recipe(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    return sharding.make_mesh(config, plan.devices(topology))


@pytest.mark.parametrize(
    "mesh, advised",
    [
        # Parameters, gradients and optimizer are 32 GiB: half of 16 GiB hold a quarter of them.
        ((8, 1, 1), (2, 4, 1)),
        ((2, 4, 1), (1, 8, 1)),  # all there are
        ((2, 2, 2), (1, 4, 2)),
    ],
)
def test_large_states_are_shared_out_over_a_mesh_that_can_be_typed(mesh, advised):
    mesh = make_mesh(*mesh)
    typed = {f"mesh.{axis}": size for axis, size in mesh.shape.items()}
    lines = plan.advice(recipe(), mesh, MEMORY, needed=40 * GIB, capacity=16 * GIB)
    keys, _, reason = lines[0].partition(": ")
    assert reason == "parameters, gradients and optimizer take 32.0 GiB"
    for word in keys.split():
        key, size = word.removeprefix("config.").split("=")
        typed[key] = int(size)
    config = config_lib.load("configs/causal_lm.py:tiny", SMALL | typed)
    assert sharding.make_mesh(config, plan.devices("cpu:8")).axis_sizes == advised


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2)])
def test_states_that_all_devices_share_need_more_devices(mesh):
    mesh = make_mesh(*mesh)
    lines = plan.advice(recipe(), mesh, MEMORY, needed=40 * GIB, capacity=16 * GIB)
    assert lines[0] == (
        "a larger --topology: parameters, gradients and optimizer take 32.0 GiB "
        "on each of 8 devices"
    )


def test_large_activations_are_made_smaller():
    memory = {key: value / 32 for key, value in MEMORY.items()}  # 1 GiB with gradients
    mesh = make_mesh(4, 1, 1)
    config = recipe(train__batch_size=64, data__sequence_length=1024, model__logits_chunk=64)
    lines = plan.advice(config, mesh, memory, needed=40 * GIB, capacity=16 * GIB)
    assert lines == [
        "config.model.remat=outputs: activations and other temporaries take 39.0 GiB",
        "config.model.attention=splash or cudnn (no L x L scores)",
        "config.train.accumulation=4",  # 39 / 15 = 2.6 times less; 16 rows are not cut in 3
        "config.model.logits_chunk=32",
        "a smaller config.train.batch_size (now 64)",
        "or config.data.sequence_length (now 1024)",
    ]


def test_microbatches_have_at_least_one_row():
    config = recipe(train__batch_size=8, model__remat="full")
    mesh, memory = make_mesh(4, 1, 1), dict.fromkeys(MEMORY, 0)
    lines = plan.advice(config, mesh, memory, needed=400 * GIB, capacity=16 * GIB)
    assert lines[0].startswith("config.train.accumulation=2: ")


def test_what_is_turned_already_is_not_advised():
    config = recipe(model__remat="full", train__batch_size=8)
    mesh = make_mesh(8, 1, 1)
    memory = dict.fromkeys(MEMORY, 0)
    lines = plan.advice(config, mesh, memory, needed=40 * GIB, capacity=16 * GIB)
    assert [line.split(" ")[1] for line in lines] == [
        "smaller",
        "config.data.sequence_length",
    ]


@pytest.mark.parametrize(
    "complaint, gib",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (31.68G) exceeds available HBM (15.75G).",
            31.68,
        ),
        ("Ran out of memory in memory space hbm. Used 512.50M of 256.00M hbm.", 512.5 / 1024),
    ],
)
def test_the_compiler_tells_what_it_needs(complaint, gib):
    assert plan.needed_by(complaint) == pytest.approx(gib * GIB)


@pytest.mark.parametrize(
    "kind, told, bytes",
    [
        ("TPU v5 lite", None, 15.75 * GIB),
        ("NVIDIA H100", {"bytes_limit": 3}, 3),  # of several sizes
        ("unheard of", {"bytes_limit": 3}, 3),
        ("cpu", None, None),
    ],
)
def test_the_memory_of_a_device_is_known_or_asked_for(kind, told, bytes):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: told)
    assert plan._capacity(device) == bytes


def test_another_failure_of_the_compiler_is_one_line(monkeypatch):
    def fail(program, config):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\n at some place\n and another")

    monkeypatch.setattr(program_lib, "compile_update", fail)
    with pytest.raises(UserError) as caught:
        plan.measure(recipe(), "cpu:8", 0.5)
    assert str(caught.value) == ("--topology='cpu:8': the compiler failed: INTERNAL: Mosaic failed")


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e", "--topology='v5e' is none that is known: e.g. v5e:4x4"),
        ("v9:2x2", "--topology='v9:2x2' is none that is known"),
        ("cpu:0", "--topology='cpu:0'"),
        ("cpu:64", "--topology=cpu:64: this process has 8 simulated devices"),
    ],
)
def test_topologies_that_do_not_exist(topology, message):
    jax.devices()  # too late then for more than the eight
    with pytest.raises(UserError, match=message):
        plan.devices(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_libtpu_says_what_to_install():
    with pytest.raises(UserError, match="needs libtpu.*pip install.*tpu"):
        plan.devices("v5e:2x2")


@pytest.mark.parametrize("utilisation", ["0", "1.5", "much", "nan"])
def test_utilisation_is_a_share(utilisation):
    with pytest.raises(UserError, match=f"--utilisation='{utilisation}'"):
        plan.main(recipe(), "cpu:8", utilisation, None)


def test_meshes_that_do_not_multiply_are_refused():
    with pytest.raises(UserError, match="don't multiply to the number of devices, 8"):
        plan.measure(recipe(mesh__data=3), "cpu:8", 0.5)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x3", "v5p:5x1x1"])
def test_slices_that_are_not_built_are_refused(topology):
    with pytest.raises(UserError, match=f"--topology='{topology}'"):
        plan.devices(topology)


@needs_libtpu
def test_what_is_compiled_for_a_slice_is_never_read_from_the_cache():
    """A warning, and so an error, if it were; the first program decides for CPUs that it is."""
    jax.jit(lambda x: x + 5)(1.0)
    place = jax.sharding.SingleDeviceSharding(plan.devices("v5e:2x2")[0])
    array = jax.ShapeDtypeStruct((8, 128), "float32", sharding=place)
    for _ in range(2):
        jax.jit(lambda x: x * 5).lower(array).compile()


@needs_libtpu
def test_a_v4_chip_is_one_device():
    assert len(plan.devices("v4:2x2x1")) == 4


@needs_libtpu
def test_no_mesh_is_advised_that_cuts_a_side_of_the_torus():
    """Of the sides 4, 4 and 8 no product is 64, which would be enough."""
    memory = MEMORY | {"optimizer": 128 * GIB}
    mesh = make_mesh(16, 8, 1, "v4:4x4x8")
    lines = plan.advice(recipe(), mesh, memory, needed=200 * GIB, capacity=48 * GIB)
    assert lines[0].startswith("config.mesh.data=1 config.mesh.fsdp=128: ")


@needs_libtpu
@pytest.mark.parametrize("documents", [False, True])
def test_splash_attention_is_compiled_for_a_slice(documents):
    config = recipe(
        model__attention="splash",
        model__width=256,
        model__dtype="bfloat16",
        model__document_attention=documents,
        data__sequence_length=128,
        train__ema=0.0,
    )
    config = config_lib.without_epochs(config)
    vocabulary = tokenizer.stand_in(config.tokenizer.size)
    program = program_lib.build(config, vocabulary, plan.devices("v5e:2x4"))
    with jax.set_mesh(program.mesh):
        text = program_lib.compile_update(program, config).as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text


@needs_libtpu
def test_a_step_for_a_slice_is_held_against_its_memory():
    found = plan.measure(recipe(mesh__data=1), "v5e:2x2", 0.5)
    assert found.fits
    assert found.capacity == 15.75 * GIB
    assert found.tokens_per_day == pytest.approx(86_400 * 4 * 0.5 * 197e12 / found.token_flops)


@needs_libtpu
def test_a_step_that_no_compiler_fits_is_reported(capsys):
    """A table of 2^24 x 512 float32, 32 GiB, on each chip of 15.75 GiB."""
    mesh = dict(mesh__data=4, mesh__fsdp=1, mesh__tensor=1)
    large = recipe(tokenizer__size=2**24, model__width=512, **mesh)
    assert plan.main(large, "v5e:2x2", None, None) == 1
    printed = capsys.readouterr().out
    assert "config.mesh.data=1 config.mesh.fsdp=4: parameters" in printed
    assert "15.750: TOO BIG" in printed


@needs_libtpu
@pytest.mark.parametrize(
    "topology", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
)
def test_memory_is_what_the_compiler_allows(topology):
    device = plan.devices(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((200, 2**28), "float32", sharding=place)  # 200 GiB
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x.sort(0)).lower(huge).compile()
    capacity = flops.chip(device.device_kind).memory / GIB
    assert f"available HBM ({capacity:.2f}G)" in str(caught.value)


@pytest.mark.parametrize(
    "printed, status, kept",
    [
        ("tokens per day", 0, True),
        ("It does not fit. What to change", 1, True),
        ("Traceback (most recent call last)", 1, False),
        ("error: no such topology", 2, False),
    ],
)
def test_reports_of_plans_that_failed_are_not_kept(tmp_path, printed, status, kept):
    """experiments/plan/run.sh with a python that prints a line and ends with a status."""
    folder = tmp_path / "experiments/plan"
    folder.mkdir(parents=True)
    script = shutil.copy(ROOT / "experiments/plan/run.sh", folder)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{printed}'\nexit {status}\n")
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    names = ["bert_large_none", "bert_large"]
    done = subprocess.run(
        ["sh", script, *names], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split() == names  # one that fails does not keep the next from its turn
    assert sorted(file.stem for file in folder.glob("*.txt")) == (sorted(names) if kept else [])
    assert done.returncode == (0 if kept else 1)
    assert kept or f"bert_large: no report: {printed}" in done.stderr
