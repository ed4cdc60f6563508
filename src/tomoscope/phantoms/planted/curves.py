"""A small CNN with hand-set detectors: oriented edges and opponent colours, and curves built from edges.

Source: Olah et al. 2020, "Zoom In: An Introduction to Circuits" (Distill), whose curve detectors are edge detectors at
turning orientations along an arc, with the opposite curve inhibited; Gabor 1946 for the edges' profile. The network is
a plain `nn.Module`: edges -> ReLU -> curves -> ReLU -> mean over positions -> classes. In the order of the code:

1. first layer: odd Gabor filters for edges in twelve directions (the direction is where it is brighter, so an edge and
   its negative are two channels); blobs of an opponent colour for four hues; a few channels of noise.
2. second layer: a curve channel sums the edge channels that fit, at points along its arc, less the same for the arc
   that bends the other way and for edges of the opposite sense; its threshold lies half way between its own arc and a
   straight edge. Colour channels are handed on.
3. classes: "curved" reads all curve channels, each colour its own channel.

The order of the channels, the filters' phases, the radius and the noise vary with the seed. Null: the same weights with
every layer's entries in random order.

How it can mislead: each channel stands for one thing here (no polysemantic channel), an arc is one radius, and the
"curved" class answers to any of eight directions; thresholds were set with stimuli of `stimuli`, on which a test with
the same stimuli must succeed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.model import Subject, open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import denied, scramble
from tomoscope.phantoms.planted.spaces import generator_for, random_for
from tomoscope.phantoms.planted.stimuli import RED_GREEN, SIZE, YELLOW_BLUE, arc, edge, grid

FIRST, SECOND = 7, 13
"""Pixels of a side of the two layers' filters."""
DIRECTIONS = tuple(range(0, 360, 30))
HUES = (("red", 0), ("yellow", 90), ("green", 180), ("blue", 270))
CURVES = tuple(range(0, 360, 45))
SPARE = (4, 2)
"""Channels of noise in the two layers."""
ARC = (-40, -20, 0, 20, 40)
"""Degrees along the arc at which edges are read."""
NOISE = 0.01
READ, CURVED = 10.0, 200.0
"""Weights of the classes; a curve answers at a few pixels of the image, a colour over all of a disc."""
CLASSES = ("curved", *(name for name, _ in HUES))


class CurveNet(nn.Module):
    """edges -> curves -> classes; images [batch, 3, height, width], logits [batch, class]."""

    def __init__(self) -> None:
        super().__init__()
        first, second = len(DIRECTIONS) + len(HUES) + SPARE[0], len(CURVES) + len(HUES) + SPARE[1]
        self.edges = nn.Conv2d(3, first, FIRST, padding=FIRST // 2)
        self.edges_on = nn.ReLU()
        self.curves = nn.Conv2d(first, second, SECOND, padding=SECOND // 2)
        self.curves_on = nn.ReLU()
        self.classes = nn.Linear(second, len(CLASSES))

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch class"]:
        """Logits of the classes."""
        found = self.curves_on(self.curves(self.edges_on(self.edges(image))))
        return self.classes(found.mean((-2, -1)))


@dataclass(frozen=True)
class Plan:
    """Which channel is what: direction, hue or curve -> index; the radius in pixels; each edge's phase in degrees."""

    edges: dict[int, int]
    hues: dict[int, int]
    curves: dict[int, int]
    passed: dict[int, int]
    radius: float
    phases: dict[int, float]


def draw_plan(choose: Random) -> Plan:
    """One specimen's order of channels, radius and phases."""
    first = choose.sample(range(len(DIRECTIONS) + len(HUES) + SPARE[0]), len(DIRECTIONS) + len(HUES))
    second = choose.sample(range(len(CURVES) + len(HUES) + SPARE[1]), len(CURVES) + len(HUES))
    hues = [hue for _, hue in HUES]
    return Plan(
        dict(zip(DIRECTIONS, first, strict=False)), dict(zip(hues, first[len(DIRECTIONS) :], strict=True)),
        dict(zip(CURVES, second, strict=False)), dict(zip(hues, second[len(CURVES) :], strict=True)),
        choose.choice((5.0, 6.0, 7.0)), {direction: choose.uniform(-15, 15) for direction in DIRECTIONS},
    )  # fmt: skip


def gabor(direction: float, phase: float) -> Float[Tensor, "size size"]:
    """An odd Gabor filter of length 1 without mean, for an edge that is bright in this direction."""
    x, y = grid(FIRST)
    angle = math.radians(direction)
    across, beside = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    profile = (2 * math.pi / 6.0 * across + math.radians(phase)).sin()
    profile = profile * (-(across**2) / (2 * 1.6**2) - beside**2 / (2 * 2.2**2)).exp()
    profile = profile - profile.mean()
    return profile / profile.norm()


def fit(difference: float) -> float:
    """How well an edge fits a wanted direction: 1 at no difference, inhibition at the opposite sense."""
    cosine = math.cos(math.radians(difference))
    return math.exp(6 * (cosine - 1)) - 0.3 * max(0.0, -cosine)


def arc_points(curve: float, radius: float) -> list[tuple[float, float, float]]:
    """Points along an arc, (x, y) from its middle, and the direction in which each point's edge is bright."""
    points = []
    for turn in ARC:
        here, apex = math.radians(curve + turn), math.radians(curve)
        x, y = radius * (math.cos(here) - math.cos(apex)), radius * (math.sin(here) - math.sin(apex))
        points.append((x, y, (curve + turn + 180) % 360))
    return points


def curve_filter(plan: Plan, curve: float) -> Float[Tensor, "channel size size"]:
    """A curve channel's weights: edges along its arc, less those along the arc that bends the other way."""
    x, y = grid(SECOND)
    weight = torch.zeros(len(DIRECTIONS) + len(HUES) + SPARE[0], SECOND, SECOND)
    angle = math.radians(curve)
    for px, py, bright in arc_points(curve, plan.radius):
        depth = px * math.cos(angle) + py * math.sin(angle)  # mirrored at the tangent, the arc bends the other way
        mx, my, turned = px - 2 * depth * math.cos(angle), py - 2 * depth * math.sin(angle), 2 * curve - bright
        for direction, channel in plan.edges.items():
            weight[channel] += fit(direction - bright) * spot(x - px, y - py)
            if bright % 360 != (curve + 180) % 360:
                weight[channel] -= 0.5 * fit(direction - turned) * spot(x - mx, y - my)
    return weight / len(ARC)


def spot(x: Float[Tensor, "size size"], y: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """A Gaussian of one pixel's width that sums to 1."""
    blob = (-(x**2 + y**2) / 2).exp()
    return blob / blob.sum()


@torch.no_grad()
def wire(seed: int, *, noise: float = NOISE) -> tuple[CurveNet, Plan]:
    """The network with its noise, not yet opened."""
    generator, choose = generator_for("curves", seed), random_for("curves", seed)
    plan = draw_plan(choose)
    state = torch.random.get_rng_state()  # torch draws initial weights; the caller's random state stays
    net = CurveNet().eval().requires_grad_(False)
    torch.random.set_rng_state(state)
    for parameter in net.parameters():
        parameter.zero_()
    for direction, channel in plan.edges.items():
        net.edges.weight[channel] = gabor(direction, plan.phases[direction]) / math.sqrt(3)
    for hue, channel in plan.hues.items():
        colour = math.cos(math.radians(hue)) * torch.tensor(RED_GREEN)
        colour = colour + math.sin(math.radians(hue)) * torch.tensor(YELLOW_BLUE)
        net.edges.weight[channel] = colour[:, None, None] * spot(*grid(FIRST))
        net.curves.weight[plan.passed[hue], channel, SECOND // 2, SECOND // 2] = 1.0
        net.classes.weight[CLASSES.index(_said(hue)), plan.passed[hue]] = READ
    for curve, channel in plan.curves.items():
        net.curves.weight[channel] = curve_filter(plan, curve)
        net.classes.weight[0, channel] = CURVED
    largest = (net.edges.weight.abs().max(), net.curves.weight[list(plan.curves.values())].abs().max(), READ)
    for layer, size in zip((net.edges, net.curves, net.classes), largest, strict=True):
        layer.weight.add_(noise * float(size) * torch.randn(layer.weight.shape, generator=generator))
    set_thresholds(net, plan)
    return net, plan


def _said(hue: int) -> str:
    return next(name for name, angle in HUES if angle == hue)


def set_thresholds(net: CurveNet, plan: Plan) -> None:
    """Put each curve channel's threshold half way between its own arc and a straight edge."""
    for curve, channel in plan.curves.items():
        images = torch.stack([arc(curve, radius=plan.radius), edge(curve + 180)])
        mine, straight = net.curves(net.edges_on(net.edges(images)))[:, channel, SIZE // 2, SIZE // 2].tolist()
        net.curves.bias[channel] -= (mine + straight) / 2  # ty: ignore[not-subscriptable]


def curves_known(plan: Plan) -> tuple[Known, ...]:
    """What each channel is, and from which edges at which offsets each curve is made."""
    known = []
    for direction, channel in plan.edges.items():
        value = {"what": "edge", "orientation_degrees": (direction + 90) % 180, "bright_degrees": direction}
        known.append(Known("channel", {"site": "edges", "index": channel, **value}))
    for hue, channel in plan.hues.items():
        value = {"what": "colour", "hue_degrees": hue, "name": _said(hue)}
        known.append(Known("channel", {"site": "edges", "index": channel, **value}))
        known.append(Known("channel", {"site": "curves", "index": plan.passed[hue], **value}))
    for curve, channel in plan.curves.items():
        value = {"what": "curve", "orientation_degrees": curve, "radius": plan.radius}
        known.append(Known("channel", {"site": "curves", "index": channel, **value}))
        parts = []
        for x, y, bright in arc_points(curve, plan.radius):
            nearest = min(plan.edges, key=lambda d: (-fit(d - bright), d))
            parts.append({"index": plan.edges[nearest], "offset": [round(y), round(x)]})
        known.append(Known("weights", {"from": "edges", "to": "curves", "index": channel, "excites": parts}))
    return tuple(known)


def build(seed: int, *, noise: float = NOISE) -> Specimen:
    """A network with edge, colour and curve detectors.

    Args:
        seed: of the channels' order, phases, radius and noise.
        noise: standard deviation, in parts of each layer's largest weight (in the second layer, a curve's).

    Returns:
        A specimen; its data has "classes", their names in the order of the logits.
    """
    net, plan = wire(seed, noise=noise)
    said = f"Twelve edges, four colours, eight curves of radius {plan.radius:g}, made of edges."
    return Specimen(_opened(net), Card("curves", seed, said, curves_known(plan)), {"classes": CLASSES})


def build_scrambled(seed: int) -> Specimen:
    """The same weights with every layer's entries in random order."""
    net, plan = wire(seed)
    scramble(net, generator_for("curves_scrambled", seed))
    card = Card("curves", seed, "The weights of the detectors in random order.", denied(curves_known(plan)))
    return Specimen(_opened(net), card, {"classes": CLASSES})


def _opened(net: CurveNet) -> Subject:
    example = torch.randn(2, 3, SIZE, SIZE, generator=generator_for("curves_example", 0))
    return open_model(net, example=example)


PHANTOMS: tuple[Phantom, ...] = (
    Phantom("curves", "planted", "Edges, colours and curves in a CNN", build=build, null=build_scrambled),
)
