from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tomoscope.errors import DataError
from tomoscope.findings import figures, random_directions, random_subsets, shuffled_labels
from tomoscope.findings.control import stable_seed
from tomoscope.findings.provenance import hash_arrays, hash_texts, peak_memory_bytes, reset_peak_memory, this_machine


def test_shuffled_labels_keep_their_counts_and_groups():
    labels = np.array([0, 1, 1, 0, 1, 0])
    drawn = shuffled_labels(labels, n=50, seed=1)
    assert drawn.shape == (50, 6)
    assert np.all(drawn.sum(1) == 3)
    assert len({tuple(row) for row in drawn}) > 5
    grouped = shuffled_labels(labels, n=20, seed=1, groups=["a", "a", "a", "b", "b", "b"])
    assert np.all(grouped[:, :3].sum(1) == 2)
    np.testing.assert_array_equal(drawn, shuffled_labels(labels, n=50, seed=1))
    np.testing.assert_array_equal(labels, [0, 1, 1, 0, 1, 0])


def test_random_directions_have_the_norm_and_no_preferred_axis():
    like = np.random.default_rng(0).normal(size=(3, 16))
    drawn = random_directions(like, n=4000, seed=2)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), np.tile(np.linalg.norm(like, axis=-1), (4000, 1)))
    unit = drawn[:, 0] / np.linalg.norm(like[0])
    np.testing.assert_allclose(unit.T @ unit / 4000, np.eye(16) / 16, atol=0.01)


def test_random_directions_follow_a_covariance():
    covariance = np.diag([100.0, 1.0, 1.0, 1.0])
    drawn = random_directions(np.ones(4), n=500, seed=0, covariance=covariance)
    assert np.abs(drawn[:, 0]).mean() > 3 * np.abs(drawn[:, 1]).mean()
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 2.0)


def test_random_subsets_are_of_one_size_and_avoid_the_excluded():
    drawn = random_subsets(12, 4, n=300, seed=0, exclude=[0, 1])
    assert drawn.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in drawn)
    assert not set(drawn.ravel()) & {0, 1}
    counts = np.bincount(drawn.ravel(), minlength=12)[2:]
    assert counts.min() > 80
    with pytest.raises(DataError, match="cannot be drawn"):
        random_subsets(5, 6, n=1, seed=0)


def test_random_subsets_by_stratum_are_like_the_circuit():
    layers = np.repeat([0, 1, 2], 4)
    drawn = random_subsets(12, 3, n=50, seed=0, strata=layers.tolist(), like=[0, 1, 8])
    assert all(sorted(layers[row]) == [0, 0, 2] for row in drawn)


def test_seeds_follow_from_their_parts():
    assert stable_seed(0, "a", "b") == stable_seed(0, "a", "b")
    assert len({stable_seed(s, e, p) for s in range(3) for e in "ab" for p in "xy"}) == 12


def test_hashes_see_names_types_shapes_and_values():
    array = np.arange(6, dtype=np.float32)
    base = hash_arrays([("w", array)])
    assert base == hash_arrays([("w", array.copy())])
    others = [("v", array), ("w", array.astype(np.float64)), ("w", array.reshape(2, 3)), ("w", array + 1)]
    assert base not in {hash_arrays([other]) for other in others}
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts(["\ud800"])


def test_memory_and_machine_are_known_here():
    reset_peak_memory()
    assert (peak_memory_bytes() or 0) > 1e6
    assert this_machine().cores >= 1


def test_records_need_no_torch():
    code = "import sys, tomoscope.findings; print([m for m in ('torch','transformers','scipy') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_figures_check_their_labels():
    with pytest.raises(DataError, match="3 row labels for 2 rows"):
        figures.heatmap(np.zeros((2, 2)), title="t", rows=[1, 2, 3])
    with pytest.raises((DataError, TypeError)):  # the checked test run refuses the shape first
        figures.heatmap(np.zeros(2), title="t")
    with pytest.raises(DataError, match="differ in length"):
        figures.table({"a": [1], "b": [1, 2]}, title="t")
    with pytest.raises(DataError, match="no series"):
        figures.curve({}, title="t")
