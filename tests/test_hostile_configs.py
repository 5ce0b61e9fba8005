"""A malformed config costs one line that names it, before anything is compiled or written.

As they are typed: through the command line's own parser into the command itself. What is wrong with
text and stores is tested with the data; what two configs of one run differ in, in test_errors.py.
"""

import pathlib

import pytest

from pretraining import cli, train
from pretraining.data import prepare
from pretraining.errors import UserError

pytestmark = pytest.mark.usefixtures("never_compile")


@pytest.fixture
def no_corpus(monkeypatch):
    """Preparing may take hours: what can be known before is to be told before."""

    def prepared(*_, **__):
        raise AssertionError("it went on to prepare")

    monkeypatch.setattr(prepare, "prepare", prepared)


def refusal(words, workdir, recipe="configs/masked_lm.py:tiny") -> str:
    argv = ["train", f"--config={recipe}", f"--workdir={workdir}", *words]
    with pytest.raises(UserError) as caught:
        train.main(**cli.parse(argv, "", {"workdir": "required: a folder"}))
    message = str(caught.value)
    assert "\n" not in message
    assert written(workdir) == []
    return message


def written(workdir: pathlib.Path) -> list[str]:
    """What lies in the run folder, but the lock and the sign of life of whoever held it."""
    return sorted(p.name for p in workdir.glob("*") if p.name not in (".lock", "processes"))


def words(*changes: str) -> list[str]:
    small = ("data.sequence_length=32", "train.batch_size=16", "tokenizer.size=300")
    return [f"--config.{change}" for change in (*small, *changes)]


# What each must name: the key, its value, and what is allowed.
MALFORMED = [
    # numbers of another type, or none
    (["train.batch_size=sixteen"], ["config.train.batch_size=sixteen", "int"]),
    (["train.batch_size="], ["config.train.batch_size=", "int"]),
    (["train.batch_size=16.5"], ["config.train.batch_size=16.5", "int"]),
    (["train.batch_size=(16,16)"], ["config.train.batch_size=(16,16)", "int"]),
    (["train.batch_size=nan"], ["config.train.batch_size=nan", "int"]),
    (["train.accumulation=True"], ["config.train.accumulation=True", "int"]),
    (["data.validation=2%"], ["config.data.validation=2%", "float"]),
    (["optimizer.learning_rate=fast"], ["config.optimizer.learning_rate=fast", "float"]),
    (["log.tensorboard=perhaps"], ["config.log.tensorboard=perhaps", "oolean"]),
    # numbers out of range
    (["train.batch_size=0"], ["config.train.batch_size=0", "above 0"]),
    (["train.batch_size=-16"], ["config.train.batch_size=-16", "above 0"]),
    (["train.batch_size=99999999999999999999"], ["9" * 20, "8 devices"]),
    (["train.accumulation=0"], ["config.train.accumulation=0", "above 0"]),
    (["train.ema=1.0"], ["config.train.ema=1.0", "[0, 1)"]),
    (["train.ema=nan"], ["config.train.ema=nan", "[0, 1)"]),
    (["seed.data=-1"], ["config.seed.data=-1", "2**32 - 1"]),
    (["seed.init=4294967296"], ["config.seed.init=4294967296", "2**32 - 1"]),
    (["data.sequence_length=7"], ["config.data.sequence_length=7", "at least 8"]),
    (["data.validation=0"], ["config.data.validation=0.0", "above 0 and below 1"]),
    (["data.prefetch=-1"], ["config.data.prefetch=-1", "at least 0"]),
    (["model.heads=-2"], ["config.model.heads=-2", "above 0"]),
    (["model.heads=0"], ["config.model.heads=0", "above 0"]),
    (["model.width=0"], ["config.model.width=0", "at least 1"]),
    (["model.layers=0"], ["config.model.layers=0", "at least 1"]),
    (["model.dropout=nan"], ["config.model.dropout=nan", "[0, 1)"]),
    (["model.logits_chunk=0"], ["config.model.logits_chunk=0", "at least 1"]),
    (["optimizer.learning_rate=inf"], ["config.optimizer.learning_rate=inf", "above 0"]),
    (["optimizer.beta2=1.5"], ["config.optimizer.beta2=1.5", "[0, 1)"]),
    (["optimizer.clip=nan"], ["config.optimizer.clip=nan", "at least 0"]),
    (["tokenizer.size=7"], ["config.tokenizer.size=7", "262"]),
    (["tokenizer.size=99999999999"], ["config.tokenizer.size=99999999999", "at most"]),
    (["tokenizer.character_coverage=2"], ["character_coverage=2.0", "0.98 to 1"]),
    (["evaluate.batch_size=7"], ["config.evaluate.batch_size: 7 rows", "8 devices"]),
    (["checkpoint.keep=0"], ["config.checkpoint.keep=0", "above 0"]),
    (["log.every=0"], ["config.log.every=0", "above 0"]),
    (["log.peak_flops=nan"], ["config.log.peak_flops=nan", "at least 0"]),
    (["objective.mask_rate=1.5"], ["config.objective.mask_rate=1.5", "[0.0001, 1]"]),
    (["objective.smooth=-1"], ["config.objective.smooth=-1.0", "at least 0"]),
    # words that mean nothing
    (["model.attention=flash"], ["config.model.attention='flash'", "xla"]),
    (["model.dtype=float8"], ["config.model.dtype='float8'", "bfloat16"]),
    (["model.position=sinus"], ["config.model.position='sinus'", "rotary"]),
    (["model.remat=some"], ["config.model.remat='some'", "outputs"]),
    (["optimizer.name=adma"], ["config.optimizer.name='adma'", "adamw"]),
    (["optimizer.schedule=stairs"], ["config.optimizer.schedule='stairs'", "cosine"]),
    (["optimizer.decay_exclude=('(',)"], ["config.optimizer.decay_exclude", "'('", "expression"]),
    (["tokenizer.kind=wordpiece"], ["config.tokenizer.kind='wordpiece'", "unigram, bpe"]),
    (["tokenizer.model=/no.model"], ["/no.model", "No such file"]),
    (["objective.unit=letter"], ["config.objective.unit='letter'", "whole_word"]),
    (["objective.name=masked"], ["objectives/masked.py", "masked_lm"]),
    (["objective.name=../base"], ["config.objective.name='../base'", "masked_lm"]),
    (["init_from=nowhere"], ["config.init_from='nowhere'", "neither a run"]),
    (["init_from=gs://a/b"], ["config.init_from=gs://a/b", "not a URL"]),
    # durations
    (["train.steps=soon"], ["config.train.steps='soon'", "10M tokens"]),
    (["train.steps=3 weeks"], ["config.train.steps='3 weeks'", "2 epochs"]),
    (["train.steps=0"], ["config.train.steps=0", "at least 1"]),
    (["train.steps=-5"], ["config.train.steps=-5", "duration"]),
    (["train.steps=10%"], ["config.train.steps='10%'", "Give steps"]),
    (["train.steps=(1,2)"], ["config.train.steps=(1, 2)", "duration"]),
    (["evaluate.every=sometimes"], ["config.evaluate.every='sometimes'", "duration"]),
    (["checkpoint.keep_every=-1"], ["config.checkpoint.keep_every=-1", "duration"]),
    # keys that are none
    (["train.step=5"], ["'train.step'", "'train.steps'"]),
    (["trian.steps=5"], ["'trian.steps'", "'train.steps'"]),
    (["data.mask_rate=0.4"], ["'data.mask_rate'", "'objective.mask_rate'"]),
    (["train=5"], ["config.train is a section"]),
    # devices
    (["mesh.data=3"], ["config.mesh.data=3", "8"]),
    (["mesh.fsdp=-1"], ["config.mesh.fsdp=-1", "one of them may be -1"]),
    (["mesh.tensor=0"], ["config.mesh.tensor=0", "at least 1"]),
    (["mesh.tensor=8"], ["config.mesh.tensor=8", "attention"]),
    # what contradicts something else
    (["model.heads=3"], ["config.model.heads=3", "config.model.width=128"]),
    (["train.batch_size=12"], ["12 rows", "8 devices"]),
    (["train.accumulation=3"], ["batch_size=16", "config.train.accumulation=3"]),
    (["train.accumulation=16"], ["1 rows (a microbatch)", "8 devices"]),
    (["data.copies=3"], ["batch_size=16", "config.data.copies=3"]),
    (["optimizer.warmup=600"], ["config.optimizer.warmup=600", "500"]),
    (["objective.mask_fraction=0.7"], ["mask_fraction=0.7", "must add up to 1"]),
    (["model.position_offset=40"], ["position_offset=40", "config.data.sequence_length=32"]),
    (["model.position=rotary", "model.width=6"], ["config.model.width=6", "heads=2"]),
    (
        ["model.attention=splash", "model.attention_dropout=0"],
        ["config.model.attention='splash'", "xla"],
    ),
    # what is done about updates that go wrong
    (["guard.non_finite=ignore"], ["config.guard.non_finite='ignore'", "stop or skip"]),
    (["guard.spike=nan"], ["config.guard.spike=nan", "at least 0"]),
    (["guard.spike=inf"], ["config.guard.spike=inf", "at least 0"]),
    (["guard.spike_memory=1"], ["config.guard.spike_memory=1", "at least 2"]),
    (["guard.rewinds=-1"], ["config.guard.rewinds=-1", "at least 0"]),
    (["guard.rewinds=1"], ["config.guard.rewinds=1", "config.guard.spike=0"]),
    (["guard.silence=-1"], ["config.guard.silence=-1.0", "at least 0"]),
    (["guard.silence=inf"], ["config.guard.silence=inf", "at least 0"]),
]


@pytest.mark.parametrize("changes, parts", MALFORMED, ids=lambda each: " ".join(each)[:40])
@pytest.mark.usefixtures("no_corpus")
def test_it_is_refused_before_the_corpus_is_touched(changes, parts, tmp_path):
    message = refusal(words(*changes), tmp_path / "run")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "change, parts",
    [
        ("data.corpus=", ["config.data.corpus"]),
        ("data.corpus=()", ["config.data.corpus=()", "a source or a list"]),
        ("data.corpus=5", ["config.data.corpus=5", "a source or a list"]),
        ("data.corpus=((1,2),)", ["config.data.corpus", "(1, 2)"]),
        ("data.corpus=(('a.txt',-1),)", ["config.data.corpus", "'a.txt'", "-1"]),
        ("data.corpus=tfds:mnist", ["config.data.corpus='tfds:mnist'", "<split>"]),
        ("data.corpus=s3://bucket/x.txt", ["config.data.corpus", "s3://bucket/x.txt"]),
        ("data.errors=ignore", ["config.data.errors='ignore'", "strict"]),
        ("data.txt_documents=chapter", ["config.data.txt_documents='chapter'", "blank"]),
        ("data.cache=gs://bucket", ["config.data.cache='gs://bucket'", "mounted"]),
        ("data.cache=/proc/none", ["config.data.cache", "/proc/none"]),
        ("evaluate.sets=(('a',),)", ["config.evaluate.sets=(('a',),)", "pairs"]),
        ("evaluate.sets=(('a','x'),('a','y'))", ["config.evaluate.sets", "twice"]),
        ("tokenizer.sample_bytes=0", ["no document to train"]),
    ],
)
def test_it_is_refused_by_whoever_prepares(change, parts, small_corpus, tmp_path):
    own = [f"data.corpus={small_corpus}", f"data.cache={tmp_path / 'cache'}"]
    message = refusal(words(*own, change), tmp_path / "run")
    for part in parts:
        assert part in message


RECIPES = {
    "raises": ("raise RuntimeError('boom')", ["RuntimeError: boom"]),
    "syntax": ("def get_config(:", ["SyntaxError"]),
    "imports": ("import nowhere", ["nowhere"]),
    "null": ("\0", ["null"]),
    "ends": ("import sys; sys.exit(0)", ["SystemExit"]),
    "empty": ("", ["no function get_config"]),
    "no_function": ("get_config = 3", ["no function get_config"]),
    "fails": ("def get_config(): raise ValueError('no')", ["ValueError: no"]),
    "number": ("def get_config(): return 3", ["ConfigDict"]),
    "two": ("def get_config(one, two): return 3", ["get_config", "TypeError"]),
    "lacks": (
        "from configs import base\ndef get_config():\n c = base.get_config(); del c.train\n"
        " return c",
        ["config key 'train.", "missing"],
    ),
    "more": (
        "from configs import base\ndef get_config():\n c = base.get_config(); c.train.step = 1\n"
        " return c",
        ["'train.step'", "'train.steps'"],
    ),
    "types": (
        "from configs import masked_lm\ndef get_config():\n c = masked_lm.get_config('tiny')\n"
        " c.model.width = 'wide'\n return c",
        ["TypeError", "'width'"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("no_corpus")
def test_a_recipe_that_is_none(name, tmp_path):
    text, parts = RECIPES[name]
    recipe = tmp_path / f"{name}.py"
    recipe.write_text(text)
    message = refusal([], tmp_path / "run", recipe)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "recipe, part",
    [
        ("nothere.py", "no file 'nothere.py'"),
        ("configs", "no file 'configs'"),
        ("pyproject.toml", "a recipe is a Python file"),
        ("configs/masked_lm.py:gigantic", "no such size, there are tiny, small, base, large"),
        ("configs/quickstart.py:tiny", "without ':tiny'"),
        ("configs/base.py", "config.objective.name=''"),
    ],
)
@pytest.mark.usefixtures("no_corpus")
def test_a_recipe_that_is_not_there(recipe, part, tmp_path):
    assert part in refusal([], tmp_path / "run", recipe)


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--workdir=x"], "--config is missing"),
        (["--config=configs/masked_lm.py:tiny"], "--workdir is missing"),
        (["--config=configs/masked_lm.py:tiny", "--workdir="], "--workdir is missing"),
        (["--config=configs/masked_lm.py:tiny", "--workdri=x"], "workdri"),
        (["--config=configs/masked_lm.py:tiny", "--workdir=x", "lonely"], "'lonely'"),
    ],
)
def test_a_command_line_that_is_none(argv, part):
    with pytest.raises(UserError, match=part) as caught:
        cli.parse(["train", *argv], "", {"workdir": "required: a folder"})
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_corpus")
def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["train", "--config=configs/masked_lm.py:tiny"]
    for workdir, part in (("gs://bucket/run", "not a URL"), (tmp_path / "file/run", "--workdir=")):
        values = cli.parse([*argv, f"--workdir={workdir}"], "", {"workdir": "required: x"})
        with pytest.raises(UserError, match=part):
            train.main(**values)
    assert not pathlib.Path("gs:").exists()
