"""Compiled programs are kept from one start to the next, and never come from another machine."""

import os
import pathlib
import sys

import filelock
import jax
import pytest

from pretraining import compilation_cache, errors
from pretraining import config as config_lib
from tests import running
from tests.faults import bench

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
NOT_CHOSEN = {name.upper(): None for name in OPTIONS}


@pytest.fixture
def untold():
    """As where the user has chosen nothing; afterwards as it was."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def data_config(folder="") -> dict:
    return config_lib.load("configs/masked_lm.py:tiny", {"data.cache": str(folder)}).data


def kept() -> pathlib.Path:
    """The folder that JAX was told; that of this type of CPU is its last part."""
    return pathlib.Path(jax.config.jax_compilation_cache_dir).parent


def test_it_lies_in_the_folder_that_the_config_names(untold, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAINING_CACHE", str(tmp_path / "other"))
    compilation_cache.use(data_config(tmp_path / "mine"))
    assert kept() == tmp_path / "mine" / "compiled"


def test_else_in_that_of_the_environment(untold, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAINING_CACHE", str(tmp_path))
    compilation_cache.use(data_config())
    assert kept() == tmp_path / "compiled"


def test_else_in_the_home(untold, tmp_path, monkeypatch):
    monkeypatch.delenv("PRETRAINING_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation_cache.use(data_config())
    assert kept() == tmp_path / ".cache/pretraining/compiled"


def test_it_is_bounded(untold, tmp_path):
    compilation_cache.use(data_config(tmp_path))
    assert jax.config.jax_compilation_cache_max_size == 2 * 2**30


def test_what_the_user_has_chosen_stays(untold, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/theirs")
    before = [getattr(jax.config, name) for name in OPTIONS]
    compilation_cache.use(data_config(tmp_path / "cache"))
    assert [getattr(jax.config, name) for name in OPTIONS] == before
    assert not (tmp_path / "cache").exists()


def test_a_url_is_refused(untold):
    with pytest.raises(errors.UserError, match=r"data\.cache='gs://bucket'"):
        compilation_cache.use(data_config("gs://bucket"))


def test_where_nothing_can_be_written_nothing_is_kept(untold, tmp_path, capsys):
    (tmp_path / "compiled").write_text("a file where a folder should be")
    compilation_cache.use(data_config(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept: ")
    assert str(tmp_path / "compiled") in line


def folder_of(cpuinfo: str, tmp_path, monkeypatch) -> str:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(compilation_cache, "_CPUINFO", tmp_path / "cpuinfo")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use(data_config(tmp_path))
    return jax.config.jax_compilation_cache_dir


def test_each_type_of_cpu_has_its_own(untold, tmp_path, monkeypatch):
    core = "processor : {}\nmodel name : One\ncpu MHz : {}\nflags : sse avx2{}\n"
    plain, more = core.format(0, 2000.0, ""), core.format(0, 2000.0, " avx512f")
    first = folder_of(plain, tmp_path, monkeypatch)
    assert folder_of(more, tmp_path, monkeypatch) != first
    again = core.format(0, 1999.5, "") + core.format(1, 3000.0, "")  # another moment; more of them
    assert folder_of(again, tmp_path, monkeypatch) == first


def test_each_number_of_cores_has_its_own(untold, tmp_path, monkeypatch):
    found = set()
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        found.add(folder_of("model name : One\n", tmp_path, monkeypatch))
    assert len(found) == 2


def test_what_a_killed_process_has_left_is_removed(untold, tmp_path):
    compilation_cache.use(data_config(tmp_path))
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"12345678")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use(data_config(tmp_path))
    assert {path.name for path in folder.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_without_a_limit_of_size_all_is_kept(untold, tmp_path, monkeypatch):
    """JAX then notes no use of an entry."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    jax.config.update("jax_compilation_cache_max_size", -1)  # as JAX does at its import
    compilation_cache.use(data_config(tmp_path))
    entry = pathlib.Path(jax.config.jax_compilation_cache_dir) / "whole-cache"
    entry.touch()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use(data_config(tmp_path))
    assert entry.exists()


def test_nothing_is_removed_while_another_process_writes(untold, tmp_path, monkeypatch, capsys):
    compilation_cache.use(data_config(tmp_path))
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    (folder / "half-cache").write_bytes(b"1234")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation_cache, "_WAIT_S", 0.05)
    with filelock.FileLock(folder / ".lockfile"):
        compilation_cache.use(data_config(tmp_path))
    assert (folder / "half-cache").exists()
    assert "not kept" in capsys.readouterr().err


# -------------------------------------------------------------------------------- real processes


def train(folder, overrides) -> str:
    """Trains as from a shell in which nothing of JAX is set; what it says."""
    (words,) = running.commands_of(folder, overrides, (1, 1, 1), 1)
    ended = running.finish(running.start(words, 1, **NOT_CHOSEN))
    assert ended.status == 0, ended.err
    return ended.err


def entries(cache: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("compiled/*/*-cache")}


def test_a_second_start_compiles_nothing_and_is_the_same_run(small_overrides, tmp_path):
    overrides = small_overrides | {"data.cache": tmp_path / "cache", "train.steps": 4}
    train(tmp_path / "first", overrides)
    compiled = entries(tmp_path / "cache")
    assert any(name.startswith("jit_step") for name in compiled)
    err = train(tmp_path / "second", overrides)
    assert entries(tmp_path / "cache") == compiled  # what is compiled is written
    assert "persistent compilation cache" not in err  # JAX warns of what it cannot read
    assert bench.differences(tmp_path / "second", tmp_path / "first", steps=4) == []


@pytest.mark.parametrize("switch, count", [("false", 0), ("true", 1)])
def test_it_is_switched_off_as_jax_says(switch, count, tmp_path):
    program = (
        "import jax; from configs import base; from pretraining import compilation_cache; "
        "compilation_cache.use(base.get_config().data); jax.jit(lambda x: x + x)(jax.numpy.e)"
    )
    variables = {"PRETRAINING_CACHE": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": switch}
    words = [sys.executable, "-c", program]
    ended = running.finish(running.start(words, 1, **NOT_CHOSEN, **variables))
    assert ended.status == 0, ended.err
    assert len(entries(tmp_path)) == count
