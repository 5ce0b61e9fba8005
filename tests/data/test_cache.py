import fcntl
import json
import os
import pathlib
import platform
import resource
import shutil
import threading
import time
import types

import pytest

from pretraining.data import cache
from pretraining.errors import UserError


def build(folder: pathlib.Path) -> dict:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_bytes(b"content")
    (folder / "other").write_bytes(b"")
    return {"fact": 1}


def never(folder):
    raise AssertionError("built again")


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_complete_folder_is_built_once(tmp_path):
    cache.publish(tmp_path / "deep" / "a", build)
    cache.publish(tmp_path / "deep" / "a", never)
    manifest = cache.read_manifest(tmp_path / "deep" / "a")
    # The digests are those of `sha256sum` for "content" and for nothing.
    content = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest["files"] == {"inner/file": [7, content], "other": [0, empty]}
    assert manifest["fact"] == 1
    assert names(tmp_path / "deep") == ["a"]
    assert cache.verify(tmp_path / "deep" / "a") == []


def test_a_complete_folder_is_used_where_nothing_can_be_written(tmp_path):
    cache.publish(tmp_path / "a", build)
    (tmp_path / "a.lock").unlink()
    (tmp_path / "a.lock").mkdir()  # in the way of a lock
    cache.publish(tmp_path / "a", never)
    (tmp_path / "b.lock").mkdir()
    with pytest.raises(UserError, match=r"config.data.cache: .*b cannot be prepared"):
        cache.publish(tmp_path / "b", build)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.publish(tmp_path / "a", fail)
    assert names(tmp_path) == []
    cache.publish(tmp_path / "a", build)
    assert names(tmp_path) == ["a"]


def test_remains_of_the_dead_are_removed(tmp_path):
    own, old = f"a.partial-{platform.node()}-0", "a.partial-elsewhere-0"
    alive = f"a.partial-{platform.node()}-2-0"  # of a host whose name starts with this one's
    for name in (own, old, alive, "a.partial-elsewhere-1", "ab.partial-elsewhere-0"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(b"x")
    for path in [tmp_path / old, *(tmp_path / old).rglob("*")]:
        os.utime(path, (0, time.time() - 100_000))
    # One file written lately, and the host that writes it may be alive.
    os.utime(tmp_path / "a.partial-elsewhere-1", (0, time.time() - 100_000))
    (tmp_path / "a").mkdir()  # without a manifest
    (tmp_path / "a" / "left").write_bytes(b"x")
    cache.publish(tmp_path / "a", build)
    left = ["a", alive, "a.partial-elsewhere-1", "ab.partial-elsewhere-0"]
    assert names(tmp_path) == sorted(left)
    assert cache.verify(tmp_path / "a") == []
    assert not (tmp_path / "a" / "left").exists()


def publish_twice_at_once(folder, build):
    failures = []

    def publish():
        try:
            cache.publish(folder, build)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(folder.parent) == [folder.name]
    assert cache.verify(folder) == []


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path, capfd):
    started, built = threading.Event(), []

    def slow(folder):
        built.append(folder)
        started.wait(1)  # long enough for the other to come
        return build(folder)

    publish_twice_at_once(tmp_path / "a", slow)
    assert len(built) == 1
    assert f"waiting for another process that prepares {tmp_path / 'a'}" in capfd.readouterr().err


@pytest.mark.parametrize("locks", ["none", "of one host"])
def test_without_locks_two_build_at_once_and_agree(tmp_path, monkeypatch, locks):
    def flock(file, operation):
        if locks == "none":
            raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    # Two hosts, as two threads: each has a name of its own.
    monkeypatch.setattr(platform, "node", lambda: f"host{threading.get_ident()}")
    both = threading.Barrier(2, timeout=10)

    def together(folder):
        both.wait()
        facts = build(folder)
        both.wait()
        return facts

    publish_twice_at_once(tmp_path / "a", together)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"config.data.cache: .*file/stores/a cannot be prepared: .*Not a"
    ):
        cache.publish(tmp_path / "file" / "stores" / "a", build)


def test_a_full_disk(tmp_path):
    def large(folder):
        (folder / "file").write_bytes(bytes(1 << 16))
        return {}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be prepared: .*File too large"):
            cache.publish(tmp_path / "a", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda folder: (folder / "other").write_bytes(b"x"), "other has 1 bytes instead of 0"),
        (lambda folder: (folder / "other").unlink(), "other is missing"),
        (
            lambda folder: (folder / "inner/file").write_bytes(b"c0ntent"),
            "inner/file does not match",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text("{}"),
            "manifest.json does not match",
        ),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json does not"),
    ],
)
def test_damage_names_the_file_and_the_repair(tmp_path, damage, problem):
    cache.publish(tmp_path / "a", build)
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=rf"a is damaged: {problem}.*; delete the folder"):
        cache.read_manifest(tmp_path / "a")
    cache.publish(tmp_path / "a", never)  # never replaced in silence
    assert [problem in line for line in cache.verify(tmp_path / "a")] == [True]


def test_the_folder_of_another_is_not_believed(tmp_path):
    for name in "ab":
        cache.publish(tmp_path / name, build)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    with pytest.raises(UserError, match="a is damaged: manifest.json is that of b; delete"):
        cache.read_manifest(tmp_path / "a")


def test_shards_are_hashed_at_opening_where_all_is_small(tmp_path):
    def with_shard(folder):
        (folder / "array" / "c").mkdir(parents=True)
        (folder / "array" / "c" / "0").write_bytes(b"tokens")
        return build(folder)

    cache.publish(tmp_path / "a", with_shard)
    cache.read_manifest(tmp_path / "a")
    (tmp_path / "a" / "array" / "c" / "0").write_bytes(b"t0kens")
    cache.read_manifest(tmp_path / "a", hashed=12)  # of 6 + 7 bytes
    for most in ([], [13]):
        with pytest.raises(UserError, match="a is damaged: array/c/0 does not match its checksum"):
            cache.read_manifest(tmp_path / "a", *most)


def test_a_manifest_with_a_changed_fact_is_damaged(tmp_path):
    cache.publish(tmp_path / "a", build)
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fact": 2}))
    with pytest.raises(UserError, match="manifest.json does not match its checksum"):
        cache.read_manifest(tmp_path / "a")


def test_what_is_not_prepared(tmp_path):
    assert cache.verify(tmp_path / "a") == [
        f"{tmp_path / 'a'} is not prepared: it has no manifest.json"
    ]
    with pytest.raises(UserError, match="is not prepared"):
        cache.read_manifest(tmp_path / "a")


def test_root(monkeypatch, tmp_path):
    monkeypatch.delenv("PRETRAINING_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = types.SimpleNamespace
    assert cache.root(chosen(cache="")) == tmp_path / ".cache" / "pretraining"
    monkeypatch.setenv("PRETRAINING_CACHE", "~/elsewhere")
    assert cache.root(chosen(cache="")) == tmp_path / "elsewhere"
    assert cache.root(chosen(cache="here")) == pathlib.Path.cwd() / "here"
    with pytest.raises(UserError, match=r"config.data.cache='gs://bucket/x'"):
        cache.root(chosen(cache="gs://bucket/x"))


def test_an_address_separates_its_parts():
    addresses = {cache.address(*parts) for parts in (("ab",), ("a", "b"), ("b", "a"), ("a", 0.02))}
    assert len(addresses) == 4
    assert cache.address("a", 0.02) == cache.address("a", 0.02)
