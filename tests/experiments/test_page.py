"""A page says where its figures come from."""

import datetime
import types

import pytest

from experiments.speed import page
from pretraining import processes
from pretraining.errors import UserError

CPUINFO = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9B14\nstepping\t: 1\n"


class Memory:
    total = 24 * 2**30


class Noon:
    today = staticmethod(lambda: datetime.date(2026, 2, 3))


def test_the_origin_is_what_one_needs_to_measure_again(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(page, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(page.os, "getloadavg", lambda: (0.25, 1.0, 12.0))
    monkeypatch.setattr(page.platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(page.metadata, "version", {"jax": "0.10.1"}.__getitem__)
    monkeypatch.setattr(page.psutil, "virtual_memory", lambda: Memory)
    options = {"rounds": 4, "peer": "/opt/bin/python", "corpus": "a b/*.txt", "only": None}
    monkeypatch.setattr(page, "datetime", types.SimpleNamespace(date=Noon))
    command, facts = page.origin("peers", options, ["jax"], {"torch": "2.13"}).split("\n\n")
    assert command == (
        "`python -m experiments.speed.peers --rounds=4 --peer=python '--corpus=a b/*.txt'`"
    )
    assert facts == (
        f"2026-02-03; {processes.cores()} CPU cores, AMD EPYC 9B14, 24 GiB; load"
        " average at the start 0.2, 1.0, 12.0 (1, 5, 15 minutes); Python 3.11.7, jax 0.10.1,"
        " torch 2.13."
    )


def test_a_machine_that_does_not_tell_its_cpu_is_named_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(page.platform, "processor", lambda: "")
    monkeypatch.setattr(page.platform, "machine", lambda: "arm64")
    assert ", arm64, " in page.origin("start", {}, [])


def test_a_table_is_markdown():
    table = page.markdown(("side", "s"), iter([("ours", "1"), ["other", "2"]]))
    assert table == "| side | s |\n| --- | --- |\n| ours | 1 |\n| other | 2 |"


def test_a_page_goes_to_measured_or_to_the_option(tmp_path, capsys):
    assert page.place("start", None) == page.MEASURED / "start.md"
    path = page.place("start", str(tmp_path / "page.md"))
    page.write(path, "# Title", "text")
    assert path.read_text() == capsys.readouterr().out == "# Title\n\ntext\n"


@pytest.mark.parametrize("output", ["", "absent/page.md", "page.svg", "folder.md"])
def test_where_no_page_can_be_is_told_before_anything_is_measured(output, tmp_path):
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UserError, match=r"--output=.*a file \*\.md in a folder that is there"):
        page.place("start", str(tmp_path / output))
