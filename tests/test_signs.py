"""What follows from signs of life, on signs written by hand."""

import pytest

from pretraining import signs

# ----------------------------------------------------------------------------------------- judgment


def seen(step=7, phase="step", entered=20, silent=0.0, stood=0.0, **changes):
    sign = {"host": "h", "step": step, "phase": phase, "entered": entered}
    sign |= {"ended": None, "verdict": None} | changes
    return signs.Seen(sign, silent, stood)


def test_who_is_silent_is_lost():
    assert signs.find_lost({1: seen(silent=9.9)}, 10) is None
    assert signs.find_lost({1: seen(), 2: seen(silent=10)}, 10) == (
        "process 2 (h) has been silent for 10 s, last at step 7 in phase step"
    )
    never = signs.Seen(None, 11.0, 11.0)
    assert signs.find_lost({3: never}, 10) == "process 3 has given no sign of life for 11 s"


def test_who_came_to_the_end_may_be_silent():
    assert signs.find_lost({1: seen(silent=1000, ended="")}, 10) is None


def test_an_error_and_a_verdict_are_passed_on():
    assert signs.find_lost({1: seen(ended="UserError: no")}, 10) == (
        "process 1 (h) ended at step 7 in phase step: UserError: no"
    )
    found = {1: seen(silent=50), 2: seen(verdict="process 3 (x) hangs")}
    assert signs.find_lost(found, 100) == "process 3 (x) hangs"


def test_who_was_started_again_has_left_this_start():
    found = {1: signs.Seen(seen().sign, 0.0, 0.0, restarted=True)}
    assert "started again" in signs.find_lost(found, 10)


def test_who_stays_behind_hangs():
    waiting = seen(entered=21, stood=12)
    behind = seen(step=6, phase="data_wait", entered=18, stood=13)
    assert signs.find_hanging({0: waiting, 1: behind}, 10) == (
        "process 1 (h) hangs: for 13 s at step 6 in phase data_wait"
    )
    assert signs.find_hanging({0: seen(entered=21, stood=9), 1: behind}, 10) is None
    assert signs.find_hanging({0: waiting, 1: behind._replace(stood_s=9)}, 10) is None


def test_where_all_stand_nobody_is_to_blame():
    assert signs.find_hanging({0: seen(stood=11), 1: seen(stood=12)}, 10) == (
        "all processes have stood for 11 s at step 7 in phase step"
    )
    compiling = seen(phase="compile", stood=99)
    assert signs.find_hanging({0: compiling, 1: compiling}, 10) is None
    for_ever = compiling._replace(stood_s=100)
    assert "stood for 100 s" in signs.find_hanging({0: for_ever, 1: for_ever}, 10)


@pytest.mark.parametrize("phase, factor", [("compile", 10), ("save", 10), ("prepare", None)])
def test_some_phases_may_be_long(phase, factor):
    def judged(stood):
        behind = seen(phase=phase, entered=3, stood=stood)
        return signs.find_hanging({0: seen(entered=9, stood=stood), 1: behind}, 10)

    assert judged(10 * (factor or 1e6) - 1) is None
    assert (judged(10 * (factor or 1e6)) is None) == (factor is None)


def test_who_ended_well_is_not_waited_for():
    ended = seen(entered=30, ended="", stood=100)
    assert signs.find_hanging({0: ended, 1: ended}, 10) is None
    assert "process 1 (h) hangs" in signs.find_hanging({0: ended, 1: seen(stood=11)}, 10)


# ----------------------------------------------------------------------------------------- watching


class Signs:
    """A folder of signs, written by hand, and a clock."""

    def __init__(self, folder):
        self.folder, self.now = folder, 100.0
        (folder / signs.FOLDER).mkdir()

    def write(self, process, **values):
        sign = {"step": 0, "phase": "step", "entered": 1, "host": "h", "time": 0.0}
        sign |= {"start": "a", "beat": 1, "ended": None, "verdict": None} | values
        signs.write(self.folder, process, sign)

    def look(self, watch, seconds, most=100.0):
        self.now += seconds
        return watch.look(most)


def test_signs_of_earlier_starts_count_as_none(tmp_path):
    hand = Signs(tmp_path)
    hand.write(1, start="old")
    watch = signs.Watch(tmp_path, (0, 1), lambda: hand.now)
    assert hand.look(watch, 5.0)[1] == signs.Seen(None, 5.0, 5.0)
    hand.write(1, start="new")
    assert hand.look(watch, 1.0)[1] == signs.Seen(signs.read(tmp_path, 1), 0.0, 0.0)
    assert hand.look(watch, 2.0)[1].silent_s == 2.0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"start": "a", "beat": 1}'])
def test_what_is_no_sign_counts_as_none(content, tmp_path):
    hand = Signs(tmp_path)
    (tmp_path / signs.FOLDER / "1.json").write_text(content)
    assert signs.read(tmp_path, 1) is None
    hand.write(1)
    assert signs.read(tmp_path, 1)["beat"] == 1


def test_time_counts_from_the_last_change(tmp_path):
    hand = Signs(tmp_path)
    watch = signs.Watch(tmp_path, (1,), lambda: hand.now)
    for beat in range(1, 4):
        hand.write(1, beat=beat, time=beat * 1e9)
        found = hand.look(watch, 2.0)[1]
    assert (found.silent_s, found.stood_s) == (0.0, 4.0)
    hand.write(1, beat=4, entered=2)
    assert hand.look(watch, 2.0)[1][1:] == (0.0, 0.0, False)


def test_a_later_start_is_noticed(tmp_path):
    hand = Signs(tmp_path)
    watch = signs.Watch(tmp_path, (1,), lambda: hand.now)
    hand.write(1)
    assert not hand.look(watch, 1.0)[1].restarted
    hand.write(1, start="b")
    assert hand.look(watch, 1.0)[1].restarted


def test_who_was_stopped_itself_blames_nobody(tmp_path):
    hand = Signs(tmp_path)
    watch = signs.Watch(tmp_path, (1,), lambda: hand.now)
    hand.write(1)
    hand.look(watch, 1.0)
    assert hand.look(watch, 3600.0, most=2.0)[1].silent_s == 2.0
