"""A population: each member is its own single run, whatever happens to the others."""

import collections
import contextlib
import json
import re
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import results
from pretraining import (
    benchmark,
    checkpoint,
    cli,
    goodput,
    manifest,
    metrics,
    run_folder,
    signs,
    train,
)
from pretraining import config as config_lib
from pretraining import guard as guard_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining import step as step_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError
from pretraining.manifest import MANIFEST
from pretraining.population import __main__, check, runs, vmapped
from tests import populations, running, test_step
from tests.faults import bench
from tests.test_recompiles import COMPILED

SEEDS = {"seed.init": 1, "seed.corruption": 2, "seed.dropout": 3, "seed.evaluation": 4}
MASK_ONLY = {
    "objective.mask_rate": 0.4,
    "objective.mask_fraction": 1.0,
    "objective.random_fraction": 0.0,
    "objective.keep_fraction": 0.0,
}
RISING = {
    "objective.mask_rate": 0.2,
    "objective.mask_rate_final": 0.5,
    "objective.mask_rate_schedule": "linear",
}
# Of each objective: what its members differ in beside their seeds.
KNOBS = {
    "masked_lm": [MASK_ONLY, RISING, {"objective.predict_rate": 0.1}],
    "span_boundary": [MASK_ONLY, RISING],
    "replaced_token_detection": [MASK_ONLY | {"objective.temperature": 2.0}, RISING],
    "permutation_lm": [{"objective.backward_fraction": 0.25}, {"objective.backward_fraction": 0.5}],
    "causal_lm": [{"optimizer.learning_rate": 1e-2}],
}
VOCABULARY = tokenizer.stand_in(300)


def make_configs(objective, members):
    loaded = [
        config_lib.load(f"configs/{objective}.py:tiny", bench.SMALL | {"model.layers": 1} | own)
        for own in members
    ]
    return [config_lib.without_epochs(config) for config in loaded]


# ------------------------------------------------------------------------------ rows and masks


@pytest.fixture
def capturing(monkeypatch):
    """An update whose metrics hold what the loss would have read."""

    def gradients(objective, params, examples, knobs, key, parts):
        read = {"examples": examples, "dropout": jax.random.key_data(key)}
        return jax.tree.map(jnp.zeros_like, params), {"loss": jnp.float32(0), "read": read}

    monkeypatch.setattr(step_lib, "gradients", gradients)


@pytest.mark.parametrize("objective", config_lib.objective_names())
def test_each_member_reads_the_rows_masks_and_labels_of_its_own_single_run(objective, capturing):
    others = [SEEDS | {"seed.data": n} | own for n, own in enumerate(KNOBS[objective])]
    members = [
        {"objective.backward_fraction": 1.0} if objective == "permutation_lm" else {},
        *others,
    ]
    configs = make_configs(objective, members)
    lead, programs = vmapped.of_members(configs, VOCABULARY)
    which = vmapped.streams(configs)
    assert which == (0, 0, 1, 2)[: len(members)]
    batches = benchmark.random_batches(configs[0], VOCABULARY)
    streams = [next(batches) for _ in range(max(which) + 1)]
    functions = vmapped.Functions(configs[lead], programs, which)
    update = jax.jit(functions.update)
    seeds = stack([each.seeds for each in programs])
    begin = [dummy_state(programs[lead], step) for step in (0, 7)]
    together = [update(stack([each] * len(members)), stack(streams), seeds)[1] for each in begin]
    for number, config in enumerate(configs):
        alone = program_lib.build(config, VOCABULARY)
        parts = alone.objective, alone.optimizer, alone.learning_rate, config
        update = jax.jit(step_lib.train_step(*parts))
        scalars = ["learning_rate", *[f"knobs/{name}" for name in program_lib.knobs(parts[0])]]
        for state, figures in zip(begin, together, strict=True):
            single = update(state, streams[which[number]], alone.seeds)[1]
            for part, own in zip(
                *map(jax.tree.leaves, (figures["read"], single["read"])), strict=True
            ):
                assert_holds(part[number], own)
            for name in scalars:
                np.testing.assert_allclose(figures[name][number], single[name], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_scheduled_knobs_are_those_of_the_single_run_bit_for_bit(kind):
    """A rate is rounded to whole tokens: where it lies on a tie, its last bit decides a mask."""
    rates = {"objective.mask_rate": 0.2, "objective.mask_rate_final": 0.5, "train.steps": 10_000}
    rising = rates | {"objective.mask_rate_schedule": kind}
    configs = make_configs("masked_lm", [{"train.steps": 10_000}, rising])
    lead, programs = vmapped.of_members(configs, VOCABULARY)
    functions = vmapped.Functions(configs[lead], programs, (0, 0))
    knobs = lambda number, step: functions._objective(number).schedule(step)
    together = jax.jit(lambda steps: jax.vmap(knobs)(jnp.arange(2), steps))
    alone = [jax.jit(own.objective.schedule) for own in programs]
    steps = np.arange(10_000, dtype=np.int32)
    both = stack([jax.device_get(together(np.stack([step, step]))) for step in steps])
    for number, own in enumerate(alone):
        for name, wanted in stack([jax.device_get(own(step)) for step in steps]).items():
            np.testing.assert_array_equal(both[name][:, number], wanted)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def dummy_state(program, step):
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.state)
    return zeros.replace(step=np.int32(step))


def assert_holds(array, own):
    """The array is `own`, and behind it slots that are not used."""
    inside = tuple(slice(0, size) for size in own.shape)
    np.testing.assert_array_equal(array[inside], own)
    rest = np.array(array, copy=True)
    rest[inside] = 0
    assert not rest.any()


# ------------------------------------------------------------------------------- discarded updates


def test_an_update_that_is_not_finite_is_discarded_for_its_member_alone():
    """On the line of test_step: the square of 3e38 overflows."""
    config = test_step.config()
    recipe = config_lib.load("configs/masked_lm.py:tiny")
    config = ConfigDict(config.to_dict() | {"optimizer": recipe.optimizer.to_dict()})
    rate, seeds = lambda step: jnp.float32(0.1), test_step.SEEDS
    optimizer = optimizer_lib.create(config.optimizer, rate, {"w": jnp.float32(0)})
    begin = [test_step.state(optimizer, w) for w in (2.0, 3e38)]
    program = program_lib.Program(test_step.OBJECTIVE, optimizer, rate, None, None, seeds)
    functions = vmapped.Functions(config, [program] * 2, (0, 0))
    new, figures = jax.jit(functions.update)(
        jax.tree.map(lambda *x: jnp.stack(x), *begin),
        jax.tree.map(lambda x: x[None], test_step.rows()),
        jax.tree.map(lambda x: np.stack([x, x]), seeds),
    )
    update = step_lib.train_step(test_step.OBJECTIVE, optimizer, rate, config)
    alone = jax.jit(update)(begin[0], test_step.rows(), seeds)[0]
    np.testing.assert_allclose(new.params["w"], [alone.params["w"], 3e38], rtol=1e-6)
    assert alone.params["w"] != 2.0
    assert figures["finite"].tolist() == [True, False]
    assert new.skipped.tolist() == [0, 1]
    assert new.step.tolist() == [1, 1]


class FakeLines:
    """A line for every step, until something happens."""

    def __init__(self, end=99, reason=None):
        self.end, self.reason, self.written, self.closed = end, reason, [], 0

    def write(self, step, figures, rows, evaluation):
        if step == self.end:
            raise self.reason
        self.written.append((step, figures["loss"], rows, evaluation.get("eval/loss")))
        return figures

    def close(self):
        self.closed += 1


def make_population(members, left):
    """Of members, that work on no data."""
    of_the_loop = ("update", "evaluator", "stop")
    nothing = dict.fromkeys(("folder", "config", "prepared", "program", "ledger", *of_the_loop))
    checkpoints = runs.Checkpoints(members, left)
    which = (0, 1, 0)[: len(members)]
    return runs.Population(
        **nothing, checkpoints=checkpoints, members=tuple(members), which=which, left=left
    )


def make_member(folder, **fields):
    folder.mkdir(exist_ok=True)
    nothing = dict.fromkeys(("config", "prepared", "program", "checkpoints", "ledger"))
    own = {"folder": folder, "held": contextlib.ExitStack()}
    return runs.Member(**{**nothing, **own, **fields})


def test_a_member_that_cannot_go_on_leaves_and_the_others_go_on(tmp_path, capsys):
    spike = guard_lib.Spike(3, {})
    each = [FakeLines(), FakeLines(2, UserError("update 2 is not finite")), FakeLines(3, spike)]
    members, freed = [make_member(tmp_path / name) for name in "abc"], []
    for member in members:
        member.held.callback(freed.append, member.folder.name)
    lines = runs.Lines(each, make_population(members, {}))
    for step in (1, 2, 3, 4):
        figures = {"loss": [float(step), 7.0, step + 2.0]}
        mean = lines.write(step, figures, ["rows", "other rows"], {"eval/loss": [1, 2, 3]})
        assert mean["loss"] == {1: (1 + 7 + 3) / 3, 2: 3.0}.get(step, float(step))
        assert mean["runs"] == {1: 3, 2: 2}.get(step, 1)
        assert metrics._summary(mean) == f"mean of {mean['runs']}"
    assert each[0].written == [(step, float(step), "rows", 1) for step in (1, 2, 3, 4)]
    assert each[1].written == [(1, 7.0, "other rows", 2)]
    assert [line[0] for line in each[2].written] == [1, 2]
    out = capsys.readouterr().out
    assert f"{tmp_path / 'b'} leaves the population, train it alone: update 2 is not" in out
    assert f"{tmp_path / 'c'} leaves the population, train it alone: a loss spike at step 3" in out
    assert freed == ["b", "c"]  # at once: it may go on alone
    assert run_folder.why_left(tmp_path / "b") == "update 2 is not finite"
    assert not run_folder.why_left(tmp_path / "a")
    lines.close()
    assert [own.closed for own in each] == [1, 1, 1]
    each[0].end, each[0].reason = 5, UserError("update 5 is not finite")
    with pytest.raises(UserError, match=r"no member .* can go on; the last one: update 5 is"):
        lines.write(5, {"loss": [1.0] * 3}, ["", ""], {})


# --------------------------------------------------------------------------------------- refusals


def start(words):
    """The command, in this process."""
    options = {"workdir": "required: a folder"}
    return __main__.main(cli.parse_members(["population", *words], "", options))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train.batch_size": 32}, "config.train.batch_size is 16 and 32"),
        ({"data.copies": 2}, "config.data.copies is 1 and 2"),
        ({"train.steps": 41}, "config.train.steps is 40 and 41"),
        ({"model.width": 64}, "config.model.width is 32 and 64"),
        ({"optimizer.weight_decay": 0.5}, r"config.optimizer.weight_decay is 0\.01 and 0\.5"),
        ({"objective.unit": "span"}, "config.objective.unit is 'token' and 'span'"),
        ({"objective.mask_rate": 2.0}, "config.objective.mask_rate=2.0 is out of range"),
    ],
)
def test_members_that_one_program_cannot_train_are_refused(
    change, named, never_compile, monkeypatch, tmp_path
):
    words = populations.words({"a": bench.SMALL, "b": bench.SMALL | change}, tmp_path)
    with pytest.raises(UserError, match=named) as refusal:
        start(words[3:])
    assert "\n" not in str(refusal.value)
    if "out of range" not in named:
        told = "seeds, in the learning rate and its schedule, and in .*mask_rate"
        assert refusal.match(f"{tmp_path}/a and {tmp_path}/b cannot .* may differ in {told}")
        assert list(tmp_path.iterdir()) == []


def test_members_whose_examples_have_other_fields_are_refused():
    """Without any backward row an example of permutation_lm does not say which way it is read."""
    change = {"objective.backward_fraction": 0.25}
    configs = make_configs("permutation_lm", [{}, SEEDS | change])
    told = "one program: objective.backward_fraction: 0.25 -> 0.0$"
    with pytest.raises(UserError, match=f"examples differ cannot train in {told}"):
        vmapped.of_members(configs, VOCABULARY)


def test_a_tracker_of_one_run_in_a_process_is_refused(never_compile, monkeypatch, tmp_path):
    monkeypatch.setattr("pretraining.metrics.check", lambda config: None)
    tracked = bench.SMALL | {"log.wandb": "project"}
    words = populations.words({"a": tracked, "b": tracked | {"seed.init": 1}}, tmp_path)
    with pytest.raises(UserError, match="config.log.wandb='project': members of a population"):
        start(words[3:])


def test_members_that_have_left_are_named_and_left_out(never_compile, tmp_path, capsys):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    run_folder.mark_left(folders[0], "update 2 is not finite")
    present = __main__._without_those_that_left(["one", "other"], folders)
    assert present == (["other"], folders[1:])
    told = f"{folders[0]} has left the population, train it alone: update 2 is not finite\n"
    assert capsys.readouterr().out == told
    assert check.apart(folders, 5).startswith(f"{folders[0]} has left a population: update 2")
    run_folder.mark_left(folders[1], "a loss spike at step 3")
    words = populations.words({"a": bench.SMALL, "b": bench.SMALL | {"seed.init": 1}}, tmp_path)
    with pytest.raises(UserError, match="all members of the population have left it"):
        start(words[3:])


def test_a_folder_is_that_of_one_member(never_compile, tmp_path):
    words = populations.words({"a": bench.SMALL}, tmp_path)[3:]
    with pytest.raises(UserError, match="two members of a population have the same folder"):
        start([*words, "--", *words])


@pytest.mark.parametrize(
    "steps, every, reason",
    [
        ([[], []], 5, ""),
        ([[5], []], 5, ""),  # killed in the middle of the first save
        ([[5, 10], [5]], 5, ""),
        ([[10], [5]], 5, "0 is at step 10, {}/1 at step 5, and the newest step that all hold is 0"),
        ([[5, 10], [5, 10, 15, 20]], 5, "1 is at step 20, {}/0 at step 10, and .* hold is 10"),
        ([[7], [7]], 0, ""),  # stopped by a signal
        ([[7], []], 0, "0 is at step 7, {}/1 at step 0, and .* hold is 0"),
    ],
)
def test_members_go_on_together_unless_one_is_more_than_a_save_ahead(
    steps, every, reason, tmp_path
):
    folders = [tmp_path / str(number) for number in range(len(steps))]
    for folder, saved in zip(folders, steps, strict=True):
        started(folder, "together")
        for step in saved:
            place = folder / run_folder.CHECKPOINTS / str(step)
            place.mkdir(parents=True)
            (place / MANIFEST).write_text("")
    told = f"{tmp_path}/{reason.format(tmp_path)}" if reason else ""
    assert re.fullmatch(told, check.apart(folders, every))


def test_all_are_checked_before_one_is_recorded_and_none_is_ahead_by_then(tmp_path, monkeypatch):
    done, members = [], [make_member(tmp_path / name) for name in "ab"]
    monkeypatch.setattr(
        runs.Member, "begin_folder", lambda _, step, population: done.append(population)
    )
    checkpoints = types.SimpleNamespace(
        discard_after=lambda step: done.append(f"without {step + 1}")
    )

    def refuse(member, step):
        if member.folder.name == "b":
            raise UserError("it would have been another one")

    monkeypatch.setattr(train, "check_schedules", refuse)
    with pytest.raises(UserError, match="another one"):
        __main__.begin_folders(members, checkpoints, 5)
    assert done == []
    monkeypatch.setattr(train, "check_schedules", lambda *_: None)
    __main__.begin_folders(members, checkpoints, 5)
    __main__.begin_folders(members, checkpoints, 5)
    assert done[0] == done[3] == "without 6"
    assert done[1] == done[2] != done[4] == done[5]


def test_what_a_run_has_done_without_the_others_is_not_deleted(tmp_path):
    """Be they new ones, or those that it was started with the time before."""
    folders = [tmp_path / name for name in "ab"]
    place = folders[0] / run_folder.CHECKPOINTS / "5"
    place.mkdir(parents=True)
    (place / MANIFEST).write_text("")
    started(folders[0], "")
    told = f"{folders[0]} is at step 5, {folders[1]} at step 0, and they were not trained together"
    assert check.apart(folders, 5) == f"{told} last"
    started(folders[1], "")
    assert check.apart(folders, 5) == f"{told} last"  # each alone
    started(folders[1], "population")
    assert check.apart(folders, 5) == f"{told} last"
    started(folders[0], "population")
    assert check.apart(folders, 5) == ""  # killed in the middle of a save


def started(folder, population):
    folder.mkdir(exist_ok=True)
    (folder / run_folder.CONFIG).touch()
    with open(folder / run_folder.PROVENANCE, "a") as file:
        file.write(json.dumps({"data": "", "population": population}) + "\n")


def test_a_member_that_went_back_from_a_spike_goes_on_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / guard_lib.REWINDS).write_text("{}\n")
    told = f"{tmp_path / 'a'} has gone back from a loss spike"
    assert check.apart([tmp_path / "b", tmp_path / "a"], 5) == told


# ------------------------------------------------------------------------------------ whole runs

STEPS, SAVE_EVERY = 24, 6
MEMBERS = {
    "usual": {},
    "mask_only": MASK_ONLY | SEEDS | {"optimizer.learning_rate": 2e-3},
    "rising": RISING | {"optimizer.schedule": "cosine", "optimizer.warmup": 3, "seed.data": 1},
}


@pytest.fixture(scope="module")
def members(small_overrides):
    shared = small_overrides | {
        "model.layers": 1,
        "model.dropout": 0.1,
        "train.steps": STEPS,
        "checkpoint.every": SAVE_EVERY,
        "checkpoint.keep": 1,
        "evaluate.every": 12,
        "log.every": 1,
    }
    return {name: shared | own for name, own in MEMBERS.items()}


@pytest.fixture(scope="module")
def together(members, tmp_path_factory):
    """A population that nothing disturbs."""
    folder = tmp_path_factory.mktemp("together")
    began = time.monotonic()
    populations.complete(populations.words(members, folder))
    (folder / "wall_s").write_text(json.dumps(time.monotonic() - began))
    return folder


@pytest.fixture(scope="module")
def alone(members, tmp_path_factory):
    """Each member as a single run."""
    folder = tmp_path_factory.mktemp("alone")
    for name, overrides in members.items():
        populations.complete(populations.single(overrides, folder / name))
    return folder


def test_each_member_ends_as_its_own_single_run(together, alone):
    for name in MEMBERS:
        assert_alike(together / name, alone / name)
        held = lambda folder: sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert held(together / name) == held(alone / name) == [str(STEPS)]
        kept = [run_folder.stored_config(folder / name) for folder in (together, alone)]
        assert config_lib.to_json(kept[0]) == config_lib.to_json(kept[1])


def assert_alike(folder, single):
    """Rows and masks are the same (unigram_loss is the sum of float32 over both), losses nearly."""
    pairs = zip(running.lines_of(folder), running.lines_of(single), strict=True)
    for line, wanted in pairs:
        assert line.keys() == wanted.keys()
        for key in wanted:
            if not key.startswith("time/"):
                np.testing.assert_allclose(
                    line[key], wanted[key], rtol=1e-5, atol=1e-6, err_msg=key
                )
    ours, theirs = (
        checkpoint.load_parameters(path / run_folder.CHECKPOINTS)[0] for path in (folder, single)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


def test_each_is_charged_its_share_of_the_time(together):
    """The sum of all that was charged would else be several times as long as the program ran."""
    lines = [running.lines_of(together / name) for name in MEMBERS]
    wall = json.loads((together / "wall_s").read_text())
    total = lambda line: sum(v for k, v in line.items() if k.startswith("time/total/"))
    assert 0.5 * wall < sum(total(own[-1]) for own in lines) < 1.2 * wall
    for line in lines[0]:
        left = (STEPS - line["step"]) * len(MEMBERS)
        assert line["time/eta_s"] == pytest.approx(left * line["time/step_s"])


def test_each_counts_the_flops_of_its_own_single_run(together, alone):
    ours, theirs = ({r.name: r.step_flops for r in results.read(at)} for at in (together, alone))
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert len(set(theirs.values())) == 3  # by the rates of their masks


def test_killed_in_the_middle_of_a_save_it_ends_as_undisturbed(members, together, alone, tmp_path):
    folder, name = tmp_path / "killed", "mask_only"
    place = lambda name: folder / name / run_folder.CHECKPOINTS
    sealed = lambda name: {0, *checkpoint.sealed(place(name))}
    held = lambda: set.intersection(*map(sealed, members))
    kept = {name: own | {"checkpoint.keep": 2} for name, own in members.items()}
    with running.running([populations.words(kept, folder)], devices=1) as started:
        # Each member is sealed by a thread of its own.
        assert running.wait_for(started, lambda: max(held()) >= 2 * SAVE_EVERY)
        started[0].send_signal(signal.SIGKILL)
    # As if the kill had come in the last save that is whole by now, before this member was.
    last = max(held())
    for member in members:
        for step in sealed(member):
            if step > last or (step == last and member == name):
                (place(member) / str(step) / MANIFEST).unlink()
    start = max(held())
    assert start == last - SAVE_EVERY
    assert max(sealed("usual")) == last

    shutil.copytree(folder / name, tmp_path / name)
    populations.complete(populations.single(members[name], tmp_path / name))
    assert_alike(tmp_path / name, alone / name)  # any member goes on alone
    assert bench.starting_steps(tmp_path / name) == [0, max(sealed(name))]

    metrics.cut_back(folder / "rising" / metrics.FILE, start)  # so that a line is a new one
    with running.running([populations.words(members, folder)], devices=1) as started:
        running.wait_for_line(started, folder / "rising", start + 1)
        started[0].send_signal(signal.SIGTERM)
        stopped = running.finish(started[0])
    assert stopped.status == 128 + signal.SIGTERM, stopped.err[-2000:]
    assert f"going on from step {start}, the newest that all members hold" in stopped.out
    (at,) = sealed("usual") - {0}
    assert start < at < STEPS
    assert [sealed(name) for name in members] == [{0, at}] * len(members)

    populations.complete(populations.words(members, folder))
    for name in members:
        assert bench.differences(folder / name, together / name, STEPS) == []
        assert bench.starting_steps(folder / name) == [0, start, at]
        assert sealed(name) == {0, STEPS}


class Saved:
    """A population of a and b that saves, with keep=1, which deletes a step as soon as it may."""

    def __init__(self, folder):
        self._folder = folder
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = {"x": jax.ShapeDtypeStruct((2,), np.float32, sharding=one)}
        self._program = program_lib.Program(None, None, None, None, state, None)

    @contextlib.contextmanager
    def opened(self, start):
        """As `open_population` does; it is to go on from `start`, and would save every 50 steps."""
        with contextlib.ExitStack() as stack:
            members = [self._member(stack, self._folder / name) for name in "ab"]
            whole = make_population(members, {})
            assert __main__.starting_step(members, whole.checkpoints, every=50) == start
            whole.checkpoints.discard_after(start)
            for each in members:
                started(each.folder, "together")
            yield whole

    @contextlib.contextmanager
    def opened_alone(self, name):
        with contextlib.ExitStack() as stack:
            yield self._member(stack, self._folder / name)

    def _member(self, stack, folder):
        own = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, keep=1, retires=False)
        stack.callback(own.close)
        fields = {"program": self._program, "checkpoints": own, "ledger": goodput.Ledger()}
        return make_member(folder, **fields)

    def save(self, whole, step):
        whole.save(step, {"x": jnp.full((2, 2), jnp.float32(step))})

    def place(self, name):
        return self._folder / name / run_folder.CHECKPOINTS

    def held(self):
        return [checkpoint.sealed(self.place(name)) for name in "ab"]

    def kill_between(self, start, step):
        """Killed after a has the checkpoint of `step`, before b has it."""
        with self.opened(start) as whole:
            self.save(whole, step)
            for member in whole.members:
                member.checkpoints.wait()
        (self.place("b") / str(step) / MANIFEST).unlink()
        assert self.held() == [[start, step], [start]]


@pytest.fixture
def saved(tmp_path):
    saved = Saved(tmp_path)
    with saved.opened(0) as whole:
        saved.save(whole, 200)
        whole.checkpoints.wait()
    assert saved.held() == [[200], [200]]
    return saved


def test_a_step_that_all_hold_is_kept_until_the_next_one_is_whole_in_all(saved):
    saved.kill_between(200, 250)
    with saved.opened(200) as whole:
        saved.save(whole, 250)
        whole.checkpoints.wait()
    assert saved.held() == [[250], [250]]


def test_killed_in_a_save_and_then_stopped_by_a_signal_all_hold_the_step_of_that(saved):
    saved.kill_between(200, 250)
    with saved.opened(200) as whole:
        saved.save(whole, 230)
        whole.checkpoints.wait()
    assert saved.held() == [[230], [230]]


def test_killed_in_two_saves_there_is_still_a_step_that_all_hold(saved):
    saved.kill_between(200, 250)
    saved.kill_between(200, 250)
    with saved.opened(200):
        assert saved.held() == [[200], [200]]


def test_one_damaged_checkpoint_costs_the_other_members_nothing(saved):
    flip_a_byte(saved.place("b") / "200")
    told = "/a is at step 200, .*/b at step 0, and the newest step that all hold is 0: leave"
    with pytest.raises(UserError, match=told), saved.opened(0):
        pass
    assert saved.held() == [[200], [200]]


def test_nor_does_one_of_a_run_that_went_on_alone(saved):
    saved.kill_between(200, 250)
    started(saved.place("a").parent, "")  # it resumed at 250, and b has still to make it
    told = "/a is at step 250, .*/b at step 200, and they were not trained together last: leave"
    with pytest.raises(UserError, match=told), saved.opened(200):
        pass
    with saved.opened_alone("b") as member:
        member.save(250, {"x": jnp.zeros(2)})
        member.checkpoints.wait()
    flip_a_byte(saved.place("b") / "250")
    assert check.apart([saved.place(name).parent for name in "ab"], 50) == ""  # as it seems
    with pytest.raises(UserError, match=told), saved.opened(200):
        pass
    assert saved.held() == [[200, 250], [200, 250]]


def flip_a_byte(folder):
    """In the largest of its files, the arrays."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_is_set_aside_and_what_is_whole_deleted(saved):
    saved.kill_between(200, 250)
    with saved.opened(200):
        names = [sorted(path.name for path in saved.place(name).iterdir()) for name in "ab"]
    assert names == [["200"], ["200", "250.damaged"]]


def test_no_checkpoint_is_read_twice_to_find_where_to_go_on(saved, monkeypatch):
    saved.kill_between(200, 250)
    read, damage = [], manifest.damage
    monkeypatch.setattr(manifest, "damage", lambda at, item="": read.append(at) or damage(at, item))
    with saved.opened(200) as whole:
        assert whole.checkpoints.newest() == 200
    assert len(read) == len(set(read)) == 4


def test_each_is_saved_as_itself(saved):
    with saved.opened(200) as whole:
        whole.save(210, {"x": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
        for member, wanted in zip(whole.members, ([1, 2], [3, 4]), strict=True):
            assert member.checkpoints.restore(210, member.program.state)["x"].tolist() == wanted


def test_each_function_is_compiled_once_and_all_figures_of_a_step_are_fetched_at_once(
    members, tmp_path, monkeypatch
):
    """As tests/test_recompiles.py has it for a single run."""
    compiled, fetched, fetch = [], [], metrics.fetch
    note = lambda event, _, fun_name="", **__: event == COMPILED and compiled.append(fun_name)
    monkeypatch.setattr(metrics, "fetch", lambda x: fetched.append(0) or fetch(x))
    monkeypatch.chdir(running.ROOT)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        own = {"train.steps": 6, "evaluate.every": 0, "checkpoint.every": 3}
        members = {name: of | own for name, of in members.items()}
        assert start(populations.words(members, tmp_path)[3:]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(fetched) == 6 + 1  # the evaluation at the end
    assert sum("update" in name for name in compiled) == 1
    assert max(collections.Counter(compiled).values()) == 1, compiled


def test_a_diverging_member_leaves_for_good_and_the_others_resume(members, together, tmp_path):
    diverging = {"optimizer.learning_rate": 1e30, "optimizer.warmup": 9}
    both = {"usual": members["usual"], "diverging": members["usual"] | diverging}
    words = [*populations.words(both, tmp_path)]
    with running.running([words], devices=1) as started:
        running.wait_for_line(started, tmp_path / "usual", SAVE_EVERY + 2)
        started[0].send_signal(signal.SIGTERM)
        ended = running.finish(started[0])
    assert ended.status == 128 + signal.SIGTERM, ended.err[-2000:]
    assert "diverging leaves the population, train it alone: update" in ended.out
    assert signs.read(tmp_path / "diverging")["step"] <= SAVE_EVERY  # no sign of life since
    (at,) = checkpoint.sealed(tmp_path / "usual" / run_folder.CHECKPOINTS)
    ended = populations.complete(words)
    assert "diverging has left the population, train it alone: update" in ended.out
    assert bench.starting_steps(tmp_path / "usual") == [0, at]
    assert checkpoint.sealed(tmp_path / "diverging" / run_folder.CHECKPOINTS) == []
    lines = running.lines_of(tmp_path / "usual")
    wanted = running.lines_of(together / "usual")
    losses = lambda lines: [line["train/loss"] for line in lines]
    np.testing.assert_allclose(losses(lines), losses(wanted), rtol=1e-5)
    alone = running.finish(
        running.start(populations.single(both["diverging"], tmp_path / "diverging"))
    )
    assert alone.status == 2
    assert "is not finite" in running.last_line(alone.err)


def test_another_objective_on_four_devices_with_rows_of_their_own(small_overrides, tmp_path):
    shared = small_overrides | {
        "model.layers": 1, "train.steps": 12, "log.every": 1, "evaluate.every": 0
    }  # fmt: skip
    members = {
        "first": shared,
        "second": shared | SEEDS | {"seed.data": 5, "optimizer.learning_rate": 3e-3},
    }
    recipe = "configs/replaced_token_detection.py:tiny"
    populations.complete(populations.words(members, tmp_path / "together", recipe), devices=4)
    for name, overrides in members.items():
        populations.complete(populations.single(overrides, tmp_path / name, recipe))
        assert_alike(tmp_path / "together" / name, tmp_path / name)
