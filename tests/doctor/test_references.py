"""Reference curves: made of several seeds, and what a run beside them is told."""

import dataclasses
import json

import numpy as np
import pytest

from pretraining import doctor
from pretraining.config import objective_names
from pretraining.doctor import reference
from pretraining.errors import UserError
from tests.doctor.synthetic import diagnosed, edited, falling, nothing, put


def seed(number: int) -> doctor.Record:
    """Validation loss and gradient norm of seed 0, 1, 2 are apart by .1 each."""
    shift = 0.1 * number
    return edited(
        put(eval__masked_lm=lambda s: falling(s) + shift, train__gradient_norm=0.8 + shift),
        seed__init=number,
    )


def test_a_reference_holds_mean_and_sd_of_its_seeds():
    (found,) = reference.record([seed(0), seed(1), seed(2)])
    assert found["objective"] == "masked_lm"
    assert found["term"] == "masked_lm"
    assert found["seeds"] == 3
    assert [point["tokens"] for point in found["points"]] == [
        step * 32 * 125 for step in range(200, 2001, 200)
    ]
    last = found["points"][-1]
    expected = falling(2000) + 0.1 - 6.5
    np.testing.assert_allclose([last["excess"]["mean"], last["excess"]["sd"]], [expected, 0.1])
    np.testing.assert_allclose(
        [last["gradient_norm"]["mean"], last["gradient_norm"]["sd"]], [0.9, 0.1]
    )


def test_runs_that_differ_in_more_than_seeds_are_no_group():
    other = edited(nothing, model__width=64)
    assert len(reference.record([seed(0), seed(1), other])) == 1
    with pytest.raises(UserError, match="of 2 runs no two"):
        reference.record([seed(0), other])
    unfinished = dataclasses.replace(seed(1), lines=seed(1).lines[:-1])
    with pytest.raises(UserError, match="of 2 runs no two"):
        reference.record([seed(0), unfinished])


def test_a_run_is_compared_with_its_reference_in_standard_deviations():
    references = reference.record([seed(0), seed(1), seed(2)])  # mean: that of seed 1, sd .1
    inside = diagnosed(seed(4), references)["reference, excess"]  # 3 sd above
    assert inside.severity == "ok"
    np.testing.assert_allclose(inside.figures["z"], 3)
    above = diagnosed(seed(6), references)["reference, excess"]
    assert above.severity == "warning"
    assert "5.0 standard deviations above" in above.text
    below = diagnosed(seed(-4), references)["reference, excess"]
    assert below.severity == "note"
    assert "leaks" in below.causes[0]
    steep = edited(put(train__gradient_norm=2.5))  # the floor is .3 x .9 = .27
    finding = diagnosed(steep, references)["reference, gradient norm"]
    assert finding.severity == "warning"
    np.testing.assert_allclose(finding.figures["z"], (2.5 - 0.9) / 0.27)


def test_a_spread_of_nothing_has_a_floor():
    references = reference.record([seed(0), seed(0)])
    finding = diagnosed(seed(1), references)["reference, excess"]
    np.testing.assert_allclose(finding.figures["z"], 0.1 / 0.05)


def test_another_config_makes_a_reference_an_orientation():
    references = reference.record([seed(0), seed(1), seed(2)])
    wide = edited(put(eval__masked_lm=20.0), model__width=64, model__remat="full")
    finding = diagnosed(wide, references)["reference, excess"]
    assert finding.severity == "note"  # far away
    assert finding.text.endswith("above; for orientation only: other model.width")
    near = dataclasses.replace(seed(2), config=wide.config)
    finding = diagnosed(near, references)["reference, excess"]
    assert finding.severity == "ok"
    assert finding.text.endswith("(sd 0.100); for orientation only: other model.width")
    text = dataclasses.replace(seed(6), starts=[seed(6).starts[0] | {"data": "e" * 64}])
    assert diagnosed(text, references)["reference, excess"].text.endswith("other text")


def test_a_run_on_its_way_is_compared_at_the_tokens_it_has_seen():
    references = reference.record([seed(0), seed(1), seed(2)])
    half = seed(6)
    half = dataclasses.replace(half, lines=half.lines[:105])  # step 1,050
    finding = diagnosed(half, references)["reference, excess"]
    assert finding.figures["tokens"] == 1000 * 32 * 125
    np.testing.assert_allclose(finding.figures["z"], 5)


def test_a_run_that_is_not_evaluated_yet_is_not_compared():
    references = reference.record([seed(0), seed(1), seed(2)])
    record = seed(1)
    young = dataclasses.replace(record, lines=[line for line in record.lines if line["step"] < 200])
    assert young.lines
    compared = [name for name in diagnosed(young, references) if name.startswith("reference, ")]
    assert compared == []


def test_the_nearest_of_several_references_is_taken():
    near = reference.record([seed(0), seed(1)])
    far = reference.record([edited(nothing, model__width=64), edited(nothing, model__width=64)])
    finding = diagnosed(seed(1), [*far, *near])["reference, excess"]
    assert "orientation" not in finding.text


def test_references_are_files_and_a_damaged_one_is_named(tmp_path):
    references = reference.record([seed(0), seed(1)])
    (path,) = reference.save(references, tmp_path)
    assert reference.save(references, tmp_path) == [path]
    assert path.name.startswith("masked_lm-")
    assert reference.load(tmp_path) == references
    for content in ("{", "[]", "{}", json.dumps(references[0] | {"points": []})):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            reference.load(tmp_path)


def test_runs_that_share_no_point_make_no_reference():
    def only(at):
        def change(line):
            if line["step"] != at and "eval/masked_lm" in line:
                del line["eval/masked_lm"]

        return edited(change, seed__init=at)

    with pytest.raises(UserError, match="share no evaluation"):
        reference.record([only(200), only(400)])


def test_every_objective_has_a_reference_of_several_seeds():
    found = reference.load()
    assert {each["objective"] for each in found} == set(objective_names())
    for each in found:
        assert each["seeds"] >= 2
        assert {"tokens", "excess", "gradient_norm"} <= set(each["points"][-1])
