"""Task files as they are published, whole, compressed and damaged."""

import bz2
import gzip
import lzma
import pathlib

import pytest
import zstandard

from pretraining.errors import UserError
from pretraining.yardstick import tasks

ALL = tasks.Sample(100, (100, 100), (100, 100))


def test_what_is_read(folder):
    found = tasks.read(folder, ALL)
    assert [(p.name, p.term, len(p.pairs)) for p in found.blimp] == [
        ("a", "agreement", 3),
        ("b", "agreement", 3),
        ("c", "binding", 3),
    ]
    assert found.blimp[0].pairs[0] == ("the the the 0 a", "a value the the 1")
    train, dev = found.glue["mrpc"]
    assert (len(train), len(dev)) == (8, 4)
    assert (('said " the the the 0', "value the the 1"), 0) in train
    assert {example.label for example in found.glue["rte"][0]} == {0, 1}
    assert (("the the the 0", "of value the 2"), 0) in found.glue["rte"][1]
    assert (("value the the 1",), 1) in found.glue["cola"][1]
    assert (("value the the 1",), 1) in found.glue["sst2"][1]
    sentences = found.conll2003[1]
    assert sorted(sentences) == [
        (("document", "7"), ("NN", "CD"), ("I-PER", "O")),
        (("the", "object"), ("DT", "NN"), ("O", "I-ORG")),
    ]
    assert found.left_out == ()
    assert len(found.digests) == 11


def test_a_sample_does_not_depend_on_the_order_of_the_file(folder):
    sample = tasks.Sample(2, (3, 2), (1, 1))
    before = tasks.read(folder, sample)
    assert [len(p.pairs) for p in before.blimp] == [2, 2, 2]
    assert [len(split) for split in before.glue["sst2"]] == [3, 2]
    path = folder / "glue/SST-2/train.tsv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]))
    after = tasks.read(folder, sample)
    assert after.glue["sst2"] == before.glue["sst2"]
    whole = tasks.read(folder, ALL).glue["sst2"][0]
    assert whole[:3] == before.glue["sst2"][0]
    assert [example.texts[0][-1] for example in whole] != list("01234567")
    different = {name for name in after.digests if after.digests[name] != before.digests[name]}
    assert different == {"glue/SST-2/train.tsv"}


@pytest.mark.parametrize(
    "suffix, compress",
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_compressed_files_are_the_same_task(suffix, compress, folder):
    before = tasks.read(folder, ALL)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        pathlib.Path(f"{path}{suffix}").write_bytes(compress(path.read_bytes()))
        path.unlink()
    assert tasks.read(folder, ALL) == before


def test_a_folder_of_paradigms_is_the_same_as_one_file(folder):
    before = tasks.read(folder, ALL).blimp
    path = folder / "blimp/blimp.jsonl"
    lines = path.read_text().splitlines()
    path.unlink()
    for number in range(3):
        part = "\n".join(lines[3 * number : 3 * number + 3])
        (folder / f"blimp/{number}.jsonl").write_text(part)
    assert tasks.read(folder, ALL).blimp == before


def test_what_is_not_there_is_left_out(folder):
    for path in (folder / "glue/RTE").iterdir():
        path.unlink()
    (folder / "glue/RTE").rmdir()
    (folder / "conll2003").rename(folder / "conll")
    found = tasks.read(folder, ALL)
    assert found.left_out == ("glue/RTE", "conll2003")
    assert set(found.glue) == {"sst2", "cola", "mrpc"}
    assert found.conll2003 is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("blimp/blimp.jsonl", b"{", "blimp.jsonl line 1 is not JSON"),
        ("blimp/blimp.jsonl", b'{"UID": "a"}', "line 1 is not an object with a text at"),
        ("blimp/blimp.jsonl", b"[]", "line 1 is not an object with a text at 'UID'"),
        ("glue/SST-2/dev.tsv", b"label\tsentence\n1\tx", "its columns are 'label\\tsentence'"),
        ("glue/SST-2/dev.tsv", b"sentence\tlabel\na b\t1\t2", "dev.tsv line 2 has 3 columns"),
        ("glue/SST-2/dev.tsv", b"sentence\tlabel\na b\t2", "line 2: the label '2' is none of 0, 1"),
        ("glue/SST-2/dev.tsv", b"sentence\tlabel\n \t1", "line 2 has no text"),
        ("glue/SST-2/dev.tsv", b"sentence\tlabel\n", "dev.tsv has no examples"),
        ("glue/SST-2/dev.tsv", b"", "dev.tsv has no examples"),
        ("glue/CoLA/train.tsv", b"a\xff", "train.tsv: byte 1 is not UTF-8"),
        ("conll2003/eng.testa", b"the DT O\n", "eng.testa line 1 has 3 columns, not 4"),
        ("conll2003/eng.testa", b"the DT I-NP PER\n", "line 1: 'PER' is no IOB tag"),
        ("conll2003/eng.testa", b"-DOCSTART- -X- O O\n", "eng.testa has no examples"),
    ],
)
def test_malformed_files_are_named(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        tasks.read(folder, ALL)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for place, message in (
        (empty / "none", "there is no such folder"),
        (empty, "none of blimp, glue/SST-2, glue/CoLA, glue/MRPC, glue/RTE, conll2003 is in it"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.read(place, ALL)
    path = folder / "conll2003/eng.train"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="eng.train: there is no such file"):
        tasks.read(folder, ALL)
    for suffix, damaged in (
        (".gz", gzip.compress(content)[:-9]),
        (".xz", lzma.compress(content)[:-30]),
        (".zst", bz2.compress(content)),
    ):
        packed = folder / f"conll2003/eng.train{suffix}"
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=f"eng.train{suffix} cannot be read"):
            tasks.read(folder, ALL)
        packed.unlink()
    path.write_bytes(content)
    (folder / "blimp/blimp.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no file \*.jsonl"):
        tasks.read(folder, ALL)
