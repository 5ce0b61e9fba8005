"""Checkpoints: bit for bit on any mesh, in the background, and never a damaged one."""

import functools
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pretraining import manifest
from pretraining.checkpoint import Checkpoints, load_parameters
from pretraining.errors import UserError


@flax.struct.dataclass
class State:
    params: Any
    optimizer: Any
    ema: Any
    step: Any
    carry: Any = ()


class Moments(NamedTuple):
    count: Any
    mu: Any
    nothing: Any


SPECS = {"kernel": P("data", "model"), "bias": P("model"), "keys": P()}


def host_state(seed, ema=True):
    """Values of odd types, with a signed zero and a NaN that carries a payload."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(16, 8)).astype(np.float32)
    kernel.view(np.uint32)[0, :2] = 0x80000000, 0x7FC0BEEF
    params = {
        "encoder": {"layer_0": {"kernel": kernel}, "bias": kernel[0].astype(jnp.bfloat16)},
        "head": {"kernel": random.integers(0, 9, size=(8, 8)).astype(np.float16)},
    }
    return State(
        params=params,
        optimizer=(
            Moments(np.int32(seed), {"kernel": kernel * 2}, optax.MaskedNode()),
            optax.EmptyState(),
            {"keys": random.integers(0, 2**32, size=(2,), dtype=np.uint32)},
        ),
        ema=params if ema else None,
        step=np.int32(seed),
    )


def mesh(rows, columns):
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return jax.sharding.Mesh(devices, ("data", "model"))


def shardings(state, over):
    return jax.tree.map_with_path(
        lambda path, _: NamedSharding(over, SPECS.get(getattr(path[-1], "key", ""), P())), state
    )


def put(state, over):
    """On the mesh, in buffers of JAX's own: on CPU `device_put` may share those of numpy."""
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings(state, over))(
        state
    )


def abstract(state, over):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, over),
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
    """Checkpoints of one folder, closed at the end; each call is a new start of the program."""
    opened = []

    def start(keep=3, keep_every=0):
        opened.append(Checkpoints(tmp_path / "checkpoints", keep, keep_every))
        return opened[-1]

    yield start
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture
def saved(open_checkpoints, tmp_path):
    """A folder with the steps 10 and 20."""
    checkpoints = open_checkpoints()
    for step in (10, 20):
        checkpoints.save(step, put(host_state(step), mesh(8, 1)))
    checkpoints.wait()
    return tmp_path / "checkpoints"


def restored(checkpoints, step):
    return checkpoints.restore(step, abstract(host_state(step), mesh(8, 1)))


def step_folders(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


# -------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("written, read", [((8, 1), (2, 4)), ((2, 4), (1, 1)), ((1, 1), (8, 1))])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(open_checkpoints, written, read, ema):
    state = host_state(7, ema)
    writer, wanted_state = open_checkpoints(), abstract(state, mesh(*read))
    writer.save(7, put(state, mesh(*written)))
    writer.wait()
    actual = open_checkpoints().restore(7, wanted_state)
    assert_same_bits(actual, state)
    for leaf, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted_state), strict=True):
        assert leaf.sharding == wanted.sharding


def test_items_lie_apart_and_parameters_need_no_other(saved):
    names = {path.name for path in (saved / "20").iterdir() if path.is_dir()}
    assert names == {"params", "ema", "optimizer", "rest"}
    (saved / "20" / "optimizer" / "_METADATA").unlink()
    parameters, step = load_parameters(saved)
    assert step == 20
    assert_same_bits(parameters, host_state(20).params)


def test_arrays_that_do_not_match_are_all_listed(open_checkpoints, saved):
    wanted = abstract(host_state(20), mesh(8, 1))
    other = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=NamedSharding(mesh(1, 1), P()))
    wanted.params["encoder"]["layer_0"]["kernel"] = other
    wanted.params["encoder"]["bias"] = wanted.params["encoder"]["bias"].update(dtype=jnp.float32)
    wanted.params["new"] = other
    del wanted.params["head"]
    with pytest.raises(UserError) as error:
        open_checkpoints().restore(20, wanted)
    assert str(error.value).splitlines()[1:] == [
        "  params/encoder/bias: saved bfloat16[8], wanted float32[8]",
        "  params/encoder/layer_0/kernel: saved float32[16,8], wanted float32[4,8]",
        "  params/head/kernel: saved float16[8,8], wanted nothing",
        "  params/new: saved nothing, wanted float32[4,8]",
    ]


def test_a_step_that_is_not_there_is_refused(open_checkpoints, saved):
    with pytest.raises(UserError, match=r"no checkpoint of step 15 .* there are: 10, 20"):
        open_checkpoints().restore(15, abstract(host_state(20), mesh(8, 1)))


def test_an_empty_folder_has_no_newest(open_checkpoints, tmp_path):
    assert open_checkpoints().newest() is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_parameters(tmp_path / "checkpoints")


@pytest.mark.parametrize("keep, keep_every, named", [(0, 0, "keep=0"), (1, -1, "keep_every=-1")])
def test_what_to_keep_is_checked(tmp_path, keep, keep_every, named):
    with pytest.raises(UserError, match=named):
        Checkpoints(tmp_path, keep, keep_every)


# ------------------------------------------------------------------------------------- background


@pytest.fixture
def gate(monkeypatch):
    """Holds every checkpoint back until it is set: written, but not committed."""
    event = threading.Event()
    options = ocp.options.AsyncOptions(post_finalization_callback=lambda: event.wait(60))
    held = functools.partial(ocp.AsyncCheckpointer, async_options=options)
    monkeypatch.setattr(ocp, "AsyncCheckpointer", held)
    yield event
    event.set()


def test_save_returns_before_the_commit(gate, open_checkpoints, tmp_path):
    checkpoints, folder = open_checkpoints(), tmp_path / "checkpoints"
    checkpoints.save(10, put(host_state(10), mesh(8, 1)))
    assert not (folder / "10").exists()
    gate.set()
    checkpoints.wait()
    assert (folder / "10" / "manifest.json").exists()
    assert_same_bits(restored(checkpoints, 10), host_state(10))


def test_donated_buffers_do_not_reach_the_checkpoint(open_checkpoints):
    """The next steps overwrite the saved state in place while it is being written."""
    replicated = NamedSharding(mesh(8, 1), P())
    host = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
    state = State({"w": jax.jit(jnp.copy, out_shardings=replicated)(host)}, {}, None, jnp.int32(1))
    train = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = train(state)  # compiled now, so that donation follows the save at once
    checkpoints = open_checkpoints()
    checkpoints.save(1, state)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for _ in range(20):
        state = train(state)
    np.testing.assert_array_equal(checkpoints.restore(1, wanted).params["w"], host + 1)


def test_what_fails_in_the_background_is_raised(open_checkpoints, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    checkpoints = open_checkpoints()
    monkeypatch.setattr(manifest, "write", fail)
    checkpoints.save(10, put(host_state(10), mesh(1, 1)))
    with pytest.raises(UserError, match="checkpoints/10 cannot be written: no space left .*none"):
        checkpoints.wait()
    assert checkpoints.newest() is None


# -------------------------------------------------------------------------------------- retention


def test_the_last_and_every_nth_are_kept(open_checkpoints, tmp_path):
    state = put(host_state(0), mesh(1, 1))
    for steps, expected in ((range(1, 5), [3, 4]), (range(5, 9), [3, 6, 7, 8])):
        checkpoints = open_checkpoints(keep=2, keep_every=3)  # resumes
        for step in steps:
            checkpoints.save(step, state)
        checkpoints.wait()
        assert step_folders(tmp_path / "checkpoints") == expected


def test_a_deleted_step_is_gone(open_checkpoints):
    checkpoints = open_checkpoints(keep=1)
    for step in (1, 2):
        checkpoints.save(step, put(host_state(step), mesh(8, 1)))
    with pytest.raises(UserError, match=r"no checkpoint of step 1 .* there are: 2"):
        restored(checkpoints, 1)


def test_a_verified_step_is_not_written_again(open_checkpoints, saved):
    first = open_checkpoints()
    first.newest()
    for checkpoints in (first, open_checkpoints()):  # known to be whole, and to be found out
        checkpoints.save(20, put(host_state(99), mesh(8, 1)))
        assert_same_bits(restored(checkpoints, 20), host_state(20))


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(open_checkpoints, saved):
    (saved / "20" / "manifest.json").write_text("{}")
    checkpoints = open_checkpoints(keep=1)
    assert checkpoints.newest() == 10
    checkpoints.save(15, put(host_state(15), mesh(8, 1)))
    checkpoints.wait()
    assert open_checkpoints().newest() == 15
    assert sorted(path.name for path in saved.iterdir()) == ["15", "20.damaged"]
    checkpoints.save(30, put(host_state(30), mesh(8, 1)))
    checkpoints.wait()
    assert [path.name for path in saved.iterdir()] == ["30"]


def test_an_unfinished_checkpoint_does_not_count_as_kept(open_checkpoints, saved):
    checkpoints = open_checkpoints(keep=3)
    checkpoints.save(30, put(host_state(30), mesh(8, 1)))
    checkpoints.wait()
    (saved / "20" / "manifest.json").unlink()
    for step, expected in ((40, [10, 20, 30, 40]), (50, [30, 40, 50])):
        checkpoints.save(step, put(host_state(step), mesh(8, 1)))
        checkpoints.wait()
        assert step_folders(saved) == expected


def test_a_damaged_step_may_be_saved_unseen(open_checkpoints, saved):
    for seed in (21, 22):  # the second time there is one set aside already
        truncate(saved / "20")
        checkpoints = open_checkpoints()
        checkpoints.save(20, put(host_state(seed), mesh(8, 1)))
        assert_same_bits(restored(checkpoints, 20), host_state(seed))


def test_what_is_newer_may_be_left_out(open_checkpoints, saved):
    checkpoints = open_checkpoints()
    assert [checkpoints.newest(step) for step in (25, 20, 19, 10, 9)] == [20, 20, 10, 10, None]


def test_what_is_discarded_but_cannot_be_deleted_counts_no_more(
    open_checkpoints, saved, monkeypatch, caplog
):
    from etils import epath

    def fail(*_):
        raise OSError("Directory not empty")

    checkpoints = open_checkpoints()
    checkpoints.newest()
    monkeypatch.setattr(type(epath.Path(saved)), "rmtree", fail)
    checkpoints.discard_after(10)
    assert "checkpoints/20 cannot be deleted: Directory not empty" in caplog.text
    assert checkpoints.newest() == open_checkpoints().newest() == 10


def test_what_would_still_count_is_not_gone_on_without(open_checkpoints, saved, monkeypatch):
    from etils import epath

    def fail(*_, **__):
        raise OSError("Read-only file system")

    checkpoints = open_checkpoints()
    monkeypatch.setattr(type(epath.Path(saved)), "unlink", fail)
    with pytest.raises(UserError, match="checkpoints after step 10 in .* cannot be deleted, and"):
        checkpoints.discard_after(10)


def test_half_a_deletion_is_no_checkpoint(open_checkpoints, saved, monkeypatch):
    from etils import epath

    checkpoints = open_checkpoints(keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(saved)), "rmtree", lambda *_: None)
        checkpoints.save(30, put(host_state(30), mesh(8, 1)))
        checkpoints.wait()
    with pytest.raises(UserError, match="the save was not finished"):
        restored(checkpoints, 20)
    checkpoints.save(40, put(host_state(40), mesh(8, 1)))
    checkpoints.wait()
    assert step_folders(saved) == [40]


def test_leftovers_are_ignored_and_cleared_away_and_strangers_left_alone(open_checkpoints, saved):
    for name in (
        "30.orbax-checkpoint-tmp",
        "40.orbax-checkpoint-tmp",
        "5.damaged",
        "3.backup",
        "notes",
    ):
        (saved / name / "params").mkdir(parents=True)
    (saved / "todo.txt").write_text("")
    checkpoints = open_checkpoints(keep=1)
    assert checkpoints.newest() == 20
    checkpoints.save(30, put(host_state(30), mesh(8, 1)))
    checkpoints.wait()
    assert {path.name for path in saved.iterdir()} == {"30", "3.backup", "notes", "todo.txt"}


# ----------------------------------------------------------------------------------------- damage


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def data_file(folder):
    return max(files_of(folder / "params"), key=lambda path: path.stat().st_size)


def truncate(folder):
    data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1])
    return "bytes instead of"


def delete(folder):
    data_file(folder).unlink()
    return "is missing"


def unfinish(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def rewrite_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["arrays"]["params/encoder/bias"] = "bfloat16[9]"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "manifest.json is damaged"


@pytest.mark.parametrize("damage", [truncate, delete, unfinish, rewrite_manifest])
def test_damage_is_named_and_the_checkpoint_before_it_is_used(
    damage, saved, open_checkpoints, caplog
):
    victim = data_file(saved / "20").name if damage in (truncate, delete) else "manifest.json"
    what = damage(saved / "20")
    checkpoints = open_checkpoints()
    with pytest.raises(UserError, match=what):
        restored(checkpoints, 20)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() == 10
    (message,) = (record.getMessage() for record in caplog.records)
    for part in (f"{saved / '20'} is not used", victim, what, "step 10 is used instead"):
        assert part in message
    assert "\n" not in message
    assert (saved / "20").exists()  # looking changes nothing: the run may be alive
    assert_same_bits(restored(checkpoints, 10), host_state(10))
    with pytest.raises(UserError, match=what):
        restored(checkpoints, 20)

    checkpoints.save(20, put(host_state(21), mesh(8, 1)))
    checkpoints.wait()
    assert (saved / "20.damaged").exists()
    assert_same_bits(restored(open_checkpoints(), 20), host_state(21))


def test_a_flipped_byte_anywhere_is_found(saved, open_checkpoints, caplog):
    random = np.random.default_rng(0)
    files = files_of(saved / "20")
    for number in range(20):
        # The first 10 in any file, the manifest among them; the others in the arrays themselves.
        path = random.choice(files) if number < 10 else data_file(saved / "20")
        intact = path.read_bytes()
        place = random.integers(len(intact))
        flipped = bytes([intact[place] ^ (1 << random.integers(8))])
        path.write_bytes(intact[:place] + flipped + intact[place + 1 :])
        caplog.clear()
        assert open_checkpoints().newest() == 10, (path, place)
        assert str(path.relative_to(saved / "20")) in caplog.text
        path.write_bytes(intact)
    assert open_checkpoints().newest() == 20


def test_a_file_that_cannot_be_read_is_damage(saved, open_checkpoints, caplog, monkeypatch):
    def fail_on_20(path, sha256=manifest._sha256):
        if "/20/" in str(path):
            raise OSError("Input/output error")
        return sha256(path)

    monkeypatch.setattr(manifest, "_sha256", fail_on_20)
    assert open_checkpoints().newest() == 10
    assert "cannot be read: Input/output error; step 10 is used instead" in caplog.text


def test_nothing_whole_is_said_so(saved, open_checkpoints, caplog):
    for step in ("10", "20"):
        truncate(saved / step)
    assert open_checkpoints().newest() is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(message.endswith("; there is no other") for message in messages)


def test_damage_to_parameters_is_refused_to_notebooks(saved, caplog):
    truncate(saved / "20")
    assert load_parameters(saved)[1] == 10
    with pytest.raises(UserError, match="bytes instead of"):
        load_parameters(saved, 20)
    with pytest.raises(UserError, match="no checkpoint of step 15"):
        load_parameters(saved, 15)


# ---------------------------------------------------------------------------- other processes

ONE_DEVICE = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

NOTEBOOK = """
import sys, jax, numpy as np
from pretraining.checkpoint import load_parameters
parameters, step = load_parameters(sys.argv[1], ema=sys.argv[2] == "ema")
leaves = jax.tree.leaves(parameters)
assert all(type(leaf) is np.ndarray for leaf in leaves)
print(jax.device_count(), step, b"".join(leaf.tobytes() for leaf in leaves).hex())
"""


def test_parameters_load_in_a_fresh_process_with_one_device(open_checkpoints, tmp_path):
    state = host_state(10).replace(ema=host_state(11).params)
    checkpoints = open_checkpoints()
    checkpoints.save(10, put(state, mesh(2, 4)))
    checkpoints.wait()
    for item in ("params", "ema"):
        command = [sys.executable, "-c", NOTEBOOK, str(tmp_path / "checkpoints"), item]
        done = subprocess.run(command, env=ONE_DEVICE, capture_output=True, text=True)
        assert done.stderr == ""
        expected = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(getattr(state, item)))
        assert done.stdout.split() == ["1", "10", expected.hex()]


def test_a_missing_average_is_said_so(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(10, put(host_state(10, ema=False), mesh(1, 1)))
    checkpoints.wait()
    with pytest.raises(UserError, match="holds no ema"):
        load_parameters(tmp_path / "checkpoints", ema=True)


# Saves for ever; the arrays of a step are a function of the step. The second argument says where it
# kills itself: before the manifest of step 4 is written, or between the two halves of a deletion.
TRAINING = """
import os, signal, sys
import flax.struct, jax, jax.numpy as jnp, numpy as np
from typing import Any
from pretraining import checkpoint, manifest

@flax.struct.dataclass
class State:
    params: Any
    step: Any

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
for step in range(1, 1000):
    if step == 4 and sys.argv[2] in ("manifest", "deletion"):
        checkpoints.wait()
        if sys.argv[2] == "manifest":
            manifest.write = die
        else:
            type(checkpoints._folder).rmtree = die
    array = np.random.default_rng(step).normal(size=(500, 1000))
    checkpoints.save(step, State({"w": jnp.asarray(array, jnp.float32)}, jnp.int32(step)))
    print(step, flush=True)
"""

# The moment, and the newest step that may be found: after "3" is printed, 2 is sealed.
MOMENTS = {"manifest": (3, 3), "deletion": (4, 4)}
MOMENTS |= dict.fromkeys((0.0, 0.02, 0.05, 0.1), (2, 999))  # seconds


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path):
    children = {}
    for moment in MOMENTS:
        command = [sys.executable, "-c", TRAINING, str(tmp_path / str(moment)), str(moment)]
        children[moment] = subprocess.Popen(command, env=ONE_DEVICE, stdout=subprocess.PIPE)
    for moment, child in children.items():
        if isinstance(moment, float):
            while child.stdout.readline() != b"3\n":
                pass
            time.sleep(moment)
            child.kill()
        assert child.wait(120) == -signal.SIGKILL
        child.stdout.close()
    for moment, (lowest, highest) in MOMENTS.items():
        assert lowest <= resume(tmp_path / str(moment)) <= highest
        assert_tidy(tmp_path / str(moment))


def resume(folder):
    """Restores the newest step, which is returned, saves one more, and restores that."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(folder, keep=2)
    newest = checkpoints.newest()
    for step in (newest, 1000):
        array = np.random.default_rng(step).normal(size=(500, 1000)).astype(np.float32)
        state = State({"w": jnp.asarray(array)}, (), None, jnp.int32(step))
        if step == 1000:
            checkpoints.save(step, state)
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state
        )
        assert_same_bits(checkpoints.restore(step, wanted), state)
    checkpoints.close()
    return newest


def assert_tidy(folder):
    """Two whole checkpoints, nothing half deleted, at most one set aside."""
    names = {path.name for path in folder.iterdir()}
    sealed = {name for name in names if (folder / name / "manifest.json").exists()}
    assert len(sealed) == 2
    assert [name for name in names - sealed if not name.endswith(".damaged")] == []
    assert len(names - sealed) <= 1


def test_the_manifest_holds_the_sizes_and_hashes_of_all_files(saved):
    manifest = json.loads((saved / "20" / "manifest.json").read_text())
    expected = {
        str(path.relative_to(saved / "20")): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files_of(saved / "20")
        if path.name != "manifest.json"
    }
    assert manifest["files"] == expected
    assert manifest["arrays"]["optimizer/2/keys"] == "uint32[2]"
