"""Reading a run, a checkpoint or a folder of others executes nothing that lies in it.

Python reports to audit hooks when a pickle looks for a name to call, and when code is unmarshalled;
so no library can do it unseen.
"""

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest

import pretraining
from pretraining import checkpoint, export, guard, init_from, program, run_folder, state
from pretraining import config as config_lib
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from pretraining.hugging_face import folder
from tests.faults import bench

_seen: list | None = None


def _hook(event, arguments):
    if _seen is None or event not in ("pickle.find_class", "marshal.loads"):
        return
    frame = sys._getframe(1)
    while frame:  # modules that are imported for the first time are code, not data
        if "importlib" in frame.f_code.co_filename:
            return
        frame = frame.f_back
    _seen.append((event, arguments))


sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_executed():
    global _seen
    _seen = []
    try:
        yield
        assert _seen == []
    finally:
        _seen = None


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


def test_the_hook_sees_it(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with pytest.raises(AssertionError, match="find_class"), nothing_executed():
        pickle.loads(bomb).close()
    assert (tmp_path / "exploded").exists()


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, to be spoiled."""
    shutil.copytree(trained["masked_lm"], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def bomb(tmp_path):
    """The bytes of a pickle; whoever loads it leaves a file."""
    yield pickle.dumps(Bomb(tmp_path / "exploded"))
    assert not (tmp_path / "exploded").exists()


def restore(run, step=bench.STEPS):
    config = run_folder.stored_config(run)
    built = program.build(config, Vocabulary.load(run / run_folder.VOCABULARY))
    checkpoints = checkpoint.Checkpoints(run / run_folder.CHECKPOINTS, 1)
    with contextlib.closing(checkpoints):
        return checkpoints.restore(step, built.state)


def test_a_run_is_read_without_executing_anything(run, bomb):
    for name in ("params.pkl", "state.pt", "checkpoints/40/pytorch_model.bin", "vocabulary/x.pkl"):
        (run / name).write_bytes(bomb)
    with nothing_executed():
        restore(run)
        assert pretraining.load(run).step == bench.STEPS


@pytest.mark.parametrize("name", ["config.json", "vocabulary/vocabulary.json"])
def test_a_pickle_in_place_of_a_description_is_damage(name, run, bomb):
    (run / name).write_bytes(bomb)
    with nothing_executed(), pytest.raises(UserError, match=f"{name} is damaged"):
        pretraining.load(run)


def test_a_pickle_in_place_of_arrays_is_damage(run, bomb):
    files = [path for path in bench.files(run / "checkpoints" / "40") if path.parent.name == "d"]
    files[0].write_bytes(bomb)
    with nothing_executed(), pytest.raises(UserError, match=files[0].name):
        restore(run)


def pickled_array(bomb) -> bytes:
    """A .npy file whose array is made by a pickle."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "|O", "fortran_order": False, "shape": (300,)}
    )
    return content.getvalue() + bomb


def test_an_array_of_objects_is_refused(run, bomb):
    """In a vocabulary that is whole by its own hashes."""
    place = run / run_folder.VOCABULARY
    (place / "unigram_counts.npy").write_bytes(pickled_array(bomb))
    description = json.loads((place / "vocabulary.json").read_text())
    found = hashlib.sha256(pickled_array(bomb)).hexdigest()
    description["sha256"]["unigram_counts.npy"] = found
    (place / "vocabulary.json").write_text(json.dumps(description))
    with nothing_executed(), pytest.raises(UserError, match=r"vocabulary.json is damaged"):
        pretraining.load(run)


def test_a_kept_batch_of_objects_is_refused(tmp_path, bomb):
    (tmp_path / guard.OFFENDING).mkdir()
    (tmp_path / guard.OFFENDING / "20-0.json").write_text('{"processes": 1}')
    with zipfile.ZipFile(tmp_path / guard.OFFENDING / "20-0-0.npz", "w") as archive:
        archive.writestr("tokens.npy", pickled_array(bomb))
    with nothing_executed(), pytest.raises(UserError, match=r"20-0\* is damaged"):
        guard.load_batch(tmp_path, 20)


# ----------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported") / "hf"
    export.export(pretraining.load(trained["masked_lm"]), place)
    return place


@pytest.fixture
def foreign(exported, tmp_path):
    """A copy of a folder in the layout of transformers, to be spoiled."""
    shutil.copytree(exported, tmp_path / "hf")
    return tmp_path / "hf"


def begin(run, foreign):
    """The state that a run begins with, by `init_from` of a folder."""
    config = run_folder.stored_config(run).copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(foreign)
    vocabulary = Vocabulary.load(run / run_folder.VOCABULARY)
    built = program.build(config, vocabulary)
    fresh = state.init(built.objective, built.optimizer, config, built.mesh)
    return init_from.start(config, fresh, vocabulary)


def test_a_folder_of_others_is_read_without_executing_anything(run, foreign, bomb):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "modeling_custom.py"):
        (foreign / name).write_bytes(bomb if not name.endswith(".py") else b"raise SystemExit(3)")
    written = json.loads((foreign / folder.CONFIG).read_text())
    written["auto_map"] = {"AutoModel": "modeling_custom.Model"}
    (foreign / folder.CONFIG).write_text(json.dumps(written))
    with nothing_executed():
        begin(run, foreign)


def test_pickled_weights_alone_are_refused(run, foreign, bomb):
    (foreign / folder.TENSORS).unlink()
    (foreign / "pytorch_model.bin").write_bytes(bomb)
    with nothing_executed(), pytest.raises(UserError, match=r"only pytorch_model.bin"):
        begin(run, foreign)


def test_a_pickle_in_place_of_tensors_is_refused(run, foreign, bomb):
    (foreign / folder.TENSORS).write_bytes(bomb)
    with nothing_executed(), pytest.raises(UserError, match=f"cannot read .*{folder.TENSORS}"):
        begin(run, foreign)


def test_every_tensor_that_does_not_fit_is_listed(run, foreign):
    tensors = folder.read_tensors(foreign)
    missing = sorted(name for name in tensors if "layer.0" in name)[:9]
    for name in missing:
        del tensors[name]
    tensors["bert.encoder.layer.1.more"] = np.ones(2, np.float32)
    cut = ["cls.predictions.bias", "bert.encoder.layer.1.output.dense.bias"]
    for name in cut:
        tensors[name] = tensors[name][1:].copy()
    written = folder.read_config(foreign)
    shutil.rmtree(foreign)
    folder.write(foreign, written, tensors)
    with pytest.raises(UserError) as caught:
        begin(run, foreign)
    for name in (*missing, *cut, "bert.encoder.layer.1.more"):
        assert name in str(caught.value)
    assert "(299,) instead of (300,)" in str(caught.value)
    assert "(31,) instead of (32,)" in str(caught.value)


def test_every_array_that_does_not_fit_is_listed(run):
    """A checkpoint of 32 positions, read into a network of 48, with one more moving average."""
    config = run_folder.stored_config(run).copy_and_resolve_references()
    with config.unlocked():
        config.data.sequence_length, config.train.ema = 48, 0.0
    (run / run_folder.CONFIG).write_text(config_lib.to_json(config))
    with pytest.raises(UserError) as caught:
        restore(run)
    message = str(caught.value)
    assert "params/encoder/embeddings/position/embedding: saved float32[32,32]" in message
    averages = [name for name in bench.leaves(run) if name.startswith("ema/")]
    assert len(averages) > 20
    for name in averages:
        assert f"{name}: saved" in message
