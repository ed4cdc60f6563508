"""The CNN's channels are tuned to what their card says, and its curves are made of the edges that the card names."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import correlate

from tests.phantoms.planted.conftest import same_weights
from tomoscope.model import open_model
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import curves, stimuli

SEEDS = (0, 1)
MIDDLE = stimuli.SIZE // 2


@pytest.fixture(scope="module")
def built():
    return {seed: curves.build(seed) for seed in SEEDS}


def channels(specimen, site, what):
    return [k.value for k in specimen.card.of("channel") if k.value["site"] == site and k.value["what"] == what]


def responses(specimen, images, site):
    """[image, channel] in the middle of the image."""
    return specimen.subject.read(torch.stack(images), site)[site][:, :, MIDDLE, MIDDLE]


def turn(first, second, round_=360):
    return abs((first - second + round_ / 2) % round_ - round_ / 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_edges_prefer_gratings_and_edges_of_their_orientation(built, seed):
    angles = list(range(0, 360, 15))
    phases = range(0, 360, 30)
    images = [stimuli.grating(angle, phase=phase) for angle in angles for phase in phases]
    tuned = responses(built[seed], images, "edges").reshape(len(angles), len(phases), -1).amax(1)
    straight = responses(built[seed], [stimuli.edge(angle) for angle in angles], "edges")
    known = channels(built[seed], "edges", "edge")
    assert len({one["index"] for one in known}) == len(curves.DIRECTIONS)
    for one in known:
        # brightness changes across the edge: at right angles to its orientation
        best = angles[int(tuned[:, one["index"]].argmax())]
        assert turn(best + 90, one["orientation_degrees"], 180) <= 15
        assert turn(angles[int(straight[:, one["index"]].argmax())], one["bright_degrees"]) <= 15
        opposite = straight[angles.index((one["bright_degrees"] + 180) % 360), one["index"]]
        assert opposite < 0


@pytest.mark.parametrize("seed", SEEDS)
def test_colours_prefer_their_hue_and_edges_see_no_colour(built, seed):
    hues = list(range(0, 360, 15))
    images = [stimuli.disc(hue) for hue in hues]
    for site in ("edges", "curves"):
        found = responses(built[seed], images, site)
        for one in channels(built[seed], site, "colour"):
            assert turn(hues[int(found[:, one["index"]].argmax())], one["hue_degrees"]) <= 15
    found = built[seed].subject.read(torch.stack(images), "edges")["edges"]
    loudest = max(float(found[:, one["index"]].max()) for one in channels(built[seed], "edges", "colour"))
    assert max(float(found[:, one["index"]].abs().max()) for one in channels(built[seed], "edges", "edge")) < (
        0.2 * loudest
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_curves_prefer_their_arc_to_lines_and_opposite_arcs(built, seed):
    specimen = built[seed]
    angles = list(range(0, 360, 15))
    for one in channels(specimen, "curves", "curve"):
        index, own, radius = one["index"], one["orientation_degrees"], one["radius"]
        arcs = responses(specimen, [stimuli.arc(angle, radius=radius) for angle in angles], "curves")[:, index]
        assert turn(angles[int(arcs.argmax())], own) <= 15
        mine = float(arcs[angles.index(own)])
        others = [stimuli.edge(angle) for angle in angles]
        others += [stimuli.arc(angle, radius=radius, inward=False) for angle in angles]
        others += [stimuli.arc(own, radius=other) for other in (radius / 2, 3 * radius)]
        assert mine > 0
        assert responses(specimen, others, "curves")[:, index].max() < mine
        inside_out = responses(specimen, [stimuli.arc(own, radius=radius, inward=False)], "curves")[0, index]
        assert inside_out < 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_card_s_parts_are_the_largest_weights(built, seed):
    """By brute force over all weights: at each named offset the named edge has the largest weight of all channels."""
    weight = built[seed].subject.model.curves.weight
    half = curves.SECOND // 2
    statements = list(built[seed].card.of("weights"))
    assert len(statements) == len(curves.CURVES)
    for known in statements:
        into = weight[known.value["index"]]
        for part in known.value["excites"]:
            y, x = part["offset"]
            here = into[:, half + y, half + x]
            assert here[part["index"]] > 0.8 * here.max()
            assert here[part["index"]] > 5 * weight[known.value["index"]].abs().mean()


def test_a_layer_is_a_correlation(built):
    """The offset's sense, against scipy: a weight at (y, x) reads the pixel at that offset from where it writes."""
    net = built[0].subject.model
    image = torch.randn(3, 33, 33, generator=torch.Generator().manual_seed(0))
    expected = sum(correlate(image[c].numpy(), net.edges.weight[3, c].numpy(), mode="constant") for c in range(3))
    assert torch.allclose(net.edges(image[None])[0, 3], torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_are_right(built, seed):
    specimen = built[seed]
    radius = channels(specimen, "curves", "curve")[0]["radius"]
    images = [stimuli.disc(hue) for _, hue in curves.HUES]
    images += [stimuli.arc(angle, radius=radius) for angle in range(0, 360, 45)]
    names = [specimen.data["classes"][i] for i in specimen.subject.model(torch.stack(images)).argmax(-1)]
    assert names == [name for name, _ in curves.HUES] + ["curved"] * 8


def test_the_null_is_not_tuned():
    null = PHANTOMS["curves"].null(0)
    assert not any(known.holds for known in null.card.known)
    angles = list(range(0, 360, 15))
    radius = channels(null, "curves", "curve")[0]["radius"]
    found = responses(null, [stimuli.arc(angle, radius=radius) for angle in angles], "curves")
    right = [
        turn(angles[int(found[:, one["index"]].argmax())], one["orientation_degrees"]) <= 15
        for one in channels(null, "curves", "curve")
    ]
    assert sum(right) < len(right) / 2


def test_builds_are_equal_by_seed_and_differ_between_seeds(built):
    again = curves.build(0)
    assert same_weights(again.subject.model, built[0].subject.model)
    assert again.card == built[0].card
    orders = [[one["index"] for one in channels(built[seed], "edges", "edge")] for seed in SEEDS]
    assert orders[0] != orders[1]


def test_weights_load_into_the_class(built, tmp_path):
    torch.save(built[0].subject.model.state_dict(), tmp_path / "net.pt")
    net = curves.CurveNet()
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    image = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(1))
    opened = open_model(net, example=image)
    assert torch.equal(opened.model(image), built[0].subject.model(image))
