"""Exponents of known powers, and tables and curves that show them."""

import types

import numpy as np
import pytest

from experiments.speed import costs
from pretraining.errors import UserError

SIZES = (64, 128, 256, 512)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_the_exponent_of_a_power_is_found(power):
    assert costs.exponent({x: 3.7 * x**power for x in SIZES}) == pytest.approx(power, abs=1e-12)


def test_a_cost_of_nothing_has_no_exponent():
    assert np.isnan(costs.exponent({64: 0.0, 128: 3.0}))


def test_a_constant_flattens_the_small_end_only():
    """Of 65,536 + x^2 the last two are 131,072 and 327,680: log2(2.5) = 1.32."""
    values = costs.table("length", {"bytes": {x: 65_536 + x**2 for x in SIZES}}).splitlines()
    assert values[0] == "| length | bytes |"
    assert values[2] == "| 64 | 69632 |"
    assert values[-1] == "| of the last two | 1.32 |"
    name, all_points = values[-2].strip("| ").split(" | ")
    assert name == "exponent"
    assert float(all_points) < 1


def test_every_curve_is_drawn_with_its_exponent():
    curves = {"time": {x: x for x in SIZES}, "memory": {x: x**2 for x in SIZES}}
    figure = costs.figure({"length": curves, "batch": curves})
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        texts = [text.get_text() for text in axis.get_legend().get_texts()]
        assert texts == ["time: 1.00", "memory: 2.00"]


def test_who_has_no_fused_kernel_is_what_the_program_refuses():
    lines = [line.strip("| ").split(" | ") for line in costs.unserved().splitlines()[2:]]
    served = {line[0]: tuple(line[1:]) for line in lines if len(line) == 3}
    assert [name for name, kernels in served.items() if kernels == ("yes", "yes")] == [
        name for name in served if name.startswith("causal or padded")
    ]
    assert [k for n, k in served.items() if n.startswith("documents")] == [("yes", "no")]
    assert [k for n, k in served.items() if "permutation_lm)" in n and "any" in n] == [("no", "no")]


def test_the_base_is_a_point_of_every_curve():
    for key, values in costs.GROWTH.values():
        assert costs.BASE[key] in values


class FakeStep:
    """Steps that take the times and the memory given."""

    flops = 6.0
    memory = types.SimpleNamespace(temp_size_in_bytes=7, argument_size_in_bytes=8)

    def __init__(self, name, done, *costs):
        self.name, self.done, self.costs = name, done, iter(costs)

    def run(self):
        self.done.append(self.name)
        return next(self.costs)


def test_the_first_round_does_not_count_and_points_take_turns():
    done = []
    steps = {
        "a": FakeStep("a", done, (100.0, 1e9), (1.0, 10), (9.0, 30), (2.0, 20)),
        "b": FakeStep("b", done, (100.0, 1e9), (5.0, 60), (4.0, 50), (3.0, 40)),
    }
    found = costs._measure(steps, rounds=3)
    assert found == {
        "a": costs.Cost(step_s=2.0, flops=6.0, temporaries=7, arguments=8, process=20.0),
        "b": costs.Cost(step_s=4.0, flops=6.0, temporaries=7, arguments=8, process=50.0),
    }
    assert "".join(done) == "abababab"


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(UserError, match="--part='memory': growth or kernels"):
        costs.main("memory", None, str(tmp_path / "page.md"))


def test_both_parts_are_not_one_file(tmp_path):
    with pytest.raises(UserError, match="is one page: choose --part=growth or --part=kernels"):
        costs.main(None, None, str(tmp_path / "page.md"))


def test_the_page_of_kernels_names_no_device_and_no_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.plan, "devices", lambda topology: [topology])
    monkeypatch.setattr(costs, "_temporaries", lambda device, kernel, length, rows: length * rows)
    monkeypatch.setitem(costs.PACKAGES, "kernels", ("jax",))  # libtpu need not be installed
    costs.main("kernels", None, str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert "`python -m experiments.speed.costs --part=kernels`" in text
    assert "one chip of v5e:2x2" in text.replace("\n", " ")
    assert (tmp_path / "page.svg").exists()
