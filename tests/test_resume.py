"""A run on eight devices has the losses of one; that it resumes, test_faults.py shows.

Real processes, with masking.
"""

import numpy as np
import pytest

from pretraining import metrics


@pytest.mark.parametrize(
    "objective, mesh",
    [
        ("causal_lm", (2, 2, 2)),
        ("masked_lm", (8, 1, 1)),
        ("masked_lm", (1, 8, 1)),
        ("permutation_lm", (2, 2, 2)),
        ("span_boundary", (2, 2, 2)),
        ("replaced_token_detection", (2, 2, 2)),
    ],
)
def test_eight_devices_give_the_losses_of_one(objective, mesh, small_overrides, command, tmp_path):
    """unigram_loss depends on rows and masks alone: any other mask would show in it."""
    runs = {}
    for name, (data, fsdp, tensor) in {"one": (1, 1, 1), "eight": mesh}.items():
        overrides = small_overrides | {"train.steps": 20, "log.every": 1, "evaluate.every": 0}
        overrides |= {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        process = command(
            "pretraining.train",
            f"configs/{objective}.py:tiny",
            overrides,
            [f"--workdir={tmp_path / name}"],
            devices=data * fsdp * tensor,
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
        runs[name] = metrics.read(tmp_path / name / metrics.FILE)
    for line, one in zip(runs["eight"], runs["one"], strict=True):
        np.testing.assert_allclose(line["train/loss"], one["train/loss"], rtol=1e-5)
        np.testing.assert_allclose(line["train/unigram_loss"], one["train/unigram_loss"], rtol=1e-6)
    assert len(runs["one"]) == 20
