"""Small Llamas that were taught capitals and pronouns through one head and at most one MLP, all that anything reads.

Training decides *how* the parts do it, the wiring decides *which* parts there are to do it. The stream has parts that
keep to themselves: `told` (the embeddings), `between`, `said` (all that the unembedding reads), and `idle`, where every
other head and MLP writes and which nothing reads. The route, by the seed:

    alone     a head reads told, writes said                      no MLP is on the way
    before    an MLP reads told, writes between; the head reads between, writes said       (the fact is recalled first)
    after     the head reads told, writes between; a later MLP reads between, writes said  (no head writes the answer)

So which parts carry the answer, what writes it into the logits, and in which block it comes to the last token is known,
by construction, of a model that was trained and is as untidy as training makes it. The null has the same wiring and was
trained on the same prompts with answers drawn at random: all the machinery, and no task.

The head begins with a look at the subjects, which training then bends; nothing else is set by hand.

How it can mislead: a trained model spreads such work over many parts, which back each other up. One head with nobody
beside it is easier to find, and harder to miss, than any head of a large model.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

import torch
import transformers
from torch import Tensor, nn

from tomoscope.data.tasks import TASKS
from tomoscope.errors import DataError
from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.words import task_tokenizer

Way = Literal["alone", "before", "after"]

TAUGHT = {"facts": "subject", "gendered_pronoun": "name"}
"""Task -> the label of what its answer follows from."""
TEXTS = {"facts": 120, "gendered_pronoun": 700}
WAYS: tuple[Way, ...] = ("alone", "before", "after")
LAYERS, HEADS, HEAD_DIM, D_MLP = 4, 4, 32, 128
MARK, LOOK = 0.5, 1.2
"""Size of the marks in the embedding, where other entries are of size `EMBEDDED`; of what the head makes of them."""
SPACES = {"told": slice(0, 64), "between": slice(64, 96), "said": slice(96, 128), "idle": slice(128, 144)}
D_MODEL, STEPS, ROWS, RATE, EMBEDDED, IDLE = 144, 120, 64, 0.01, 0.1, 0.003
RIGHT = 0.97
"""Share of the taught prompts that must be answered rightly, or it is taught once more from other weights."""
TRIES = 3


@dataclass(frozen=True)
class Route:
    """The parts that may write."""

    way: Way
    layer: int
    head: int
    mlp: int | None

    @property
    def head_site(self) -> str:
        """The site of the head's output."""
        return f"layer.{self.layer}.attn.z[head={self.head}]"

    @property
    def mlp_site(self) -> str:
        """The site of the MLP's output; of all of them where none writes."""
        return f"layer.{'*' if self.mlp is None else self.mlp}.mlp.out"

    def known(self, task: str) -> tuple[Known, ...]:
        """What is known of one taught task."""
        head, mlp = f"a{self.layer}.h{self.head}", f"m{self.mlp}"
        asked = [["embed", f"{head}<q>"], ["embed", f"{head}<k>"]]
        edges = {
            "alone": [["embed", f"{head}<v>"], [head, "logits"]],
            "before": [["embed", mlp], [mlp, f"{head}<v>"], [head, "logits"]],
            "after": [["embed", f"{head}<v>"], [head, mlp], [mlp, "logits"]],
        }[self.way]
        nodes = ["embed", *([] if self.mlp is None else [mlp]), head, "logits"]
        at = {"alone": "", "before": TAUGHT[task], "after": "end"}[self.way]
        return (
            Known("ability", {"task": task}),
            Known("site", {"task": task, "sites": [self.head_site], "at": "end"}),
            Known("site", {"task": task, "sites": [self.mlp_site], "at": at}, holds=self.mlp is not None),
            Known("circuit", {"task": task, "nodes": nodes, "edges": [*asked, *edges]}),
        )


def draw_route(seed: int) -> Route:
    """The route of a seed."""
    choose, way = Random(f"routed {seed}"), WAYS[seed % len(WAYS)]
    layer = choose.randrange(1, LAYERS - 1)
    mlp = {"alone": None, "before": choose.randrange(layer), "after": choose.randrange(layer, LAYERS)}[way]
    return Route(way, layer, choose.randrange(HEADS), mlp)


def wired(route: Route, vocab: int, generator: torch.Generator) -> tuple[nn.Module, dict[str, Tensor]]:
    """The untrained model and, for each parameter that may be trained, which entries of it may be other than 0."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=HEAD_DIM,
        num_key_value_heads=HEADS, intermediate_size=D_MLP, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    told, between, said = ((slice(None), SPACES[name]) for name in ("told", "between", "said"))
    reads, writes = (between if route.way == "before" else told), (between if route.way == "after" else said)
    own = slice(route.head * HEAD_DIM, (route.head + 1) * HEAD_DIM)
    attention = f"model.layers.{route.layer}.self_attn"
    free: dict[str, tuple[slice, slice]] = {
        "model.embed_tokens.weight": told, "lm_head.weight": said, f"{attention}.q_proj.weight": told,
        f"{attention}.k_proj.weight": told, f"{attention}.v_proj.weight": reads,
        f"{attention}.o_proj.weight": (writes[1], own),
    }  # fmt: skip
    if route.mlp is not None:
        source, to = (told, between) if route.way == "before" else (between, said)
        mlp = f"model.layers.{route.mlp}.mlp"
        free |= {f"{mlp}.{part}_proj.weight": source for part in ("gate", "up")}
        free[f"{mlp}.down_proj.weight"] = (to[1], slice(None))
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in free)
            if "norm" in name:
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * _idle(name, parameter, own if name.startswith(attention) else slice(0)))
            if name in free:
                masks[name] = torch.zeros_like(parameter)
                masks[name][free[name]] = 1.0
                size = EMBEDDED if "embed" in name else (int(masks[name][0].count_nonzero()) or HEAD_DIM) ** -0.5
                parameter.copy_(torch.where(masks[name] > 0, size * drawn, parameter))
                # the route's parts read and write nothing else
                if ".mlp." in name:
                    parameter *= masks[name]
                elif name.endswith("v_proj.weight"):
                    parameter[own] *= masks[name][own]
        _point(model, route)
    return model, masks


def _idle(name: str, parameter: Tensor, own: slice) -> Tensor:
    """The sizes of a matrix's entries before training: everything reads `told` and writes `idle`, but for `own`."""
    size = torch.zeros_like(parameter)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        size[SPACES["idle"]] = IDLE
        size[:, own] = 0.0
    elif "layers" in name:
        size[:, SPACES["told"]] = (SPACES["told"].stop) ** -0.5
    return size


def _point(model: nn.Module, route: Route) -> None:
    """Begin with a head that looks at subjects: finding where to look takes training much longer than what to say.

    One dimension of the embedding marks subjects, one is constant, and they meet in the slowest rotary pair.
    """
    weights, row = dict(model.named_parameters()), route.head * HEAD_DIM + HEAD_DIM // 2 - 1
    embedding, attention = weights["model.embed_tokens.weight"], f"model.layers.{route.layer}.self_attn"
    embedding[:, 0], embedding[:, 1] = 0.0, MARK
    embedding[sorted(_subjects()), 0] = MARK
    weights[f"{attention}.q_proj.weight"][row, 1] = LOOK
    weights[f"{attention}.k_proj.weight"][row, 0] = LOOK


@cache
def _subjects() -> frozenset[int]:
    """The tokens that the answers follow from."""
    tokenizer, found = task_tokenizer(), set()
    for task, label in TAUGHT.items():
        made = TASKS[task].make(tokenizer, TEXTS[task], seed=1).encode(tokenizer)
        for ids, spans in zip(made.clean_ids, made.spans, strict=True):
            found |= set(ids[slice(*spans[label])])
    return frozenset(found)


def taught(route: Route, seed: int, *, shuffled: bool = False) -> nn.Module:
    """Train the wiring on the tasks' prompts, only the answers counting; some seconds on one core.

    Raises DataError where it can't be taught.
    """
    tokenizer, share = task_tokenizer(), 0.0
    for attempt in range(TRIES):
        generator = torch.Generator().manual_seed(zlib.crc32(f"routed {seed} {attempt}".encode()))
        model, masks = wired(route, len(tokenizer), generator)
        ids, mask = _texts(seed, shuffled)
        _train(model, masks, ids, mask, generator)
        share = _right(model, ids, mask)
        if share >= RIGHT or shuffled:
            return model.eval()
    raise DataError(
        f"The phantom 'routed' of seed {seed} was taught {TRIES} times and answers {share:.0%} of its prompts.",
        remedy="Give another seed.",
    )


def _texts(seed: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [text, position], left-padded, the answer last."""
    tokenizer, texts, choose = task_tokenizer(), [], Random(f"routed answers {seed}")
    for task, n in TEXTS.items():
        made = TASKS[task].make(tokenizer, n, seed=10_000 + seed)
        answers = [pair.answers[0] for pair in made]
        if shuffled:
            answers = [choose.choice(answers) for _ in answers]
        told = [pair.clean.text + answer for pair, answer in zip(made, answers, strict=True)]
        texts += told * (2 if task == "facts" else 1)
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], logits_to_keep=1)
    return out.logits[:, -1]


def _train(model: nn.Module, masks: dict[str, Tensor], ids: Tensor, mask: Tensor, generator: torch.Generator) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if name in masks}
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        take = torch.randint(len(ids), (ROWS,), generator=generator)
        nn.functional.cross_entropy(_logits(model, ids[take], mask[take]), ids[take, -1]).backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            parameter.grad *= masks[name]
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def _right(model: nn.Module, ids: Tensor, mask: Tensor) -> float:
    """Share of the texts whose answer is the most probable next token."""
    return float((_logits(model, ids, mask).argmax(-1) == ids[:, -1]).float().mean())


def routed(seed: int) -> Specimen:
    """A model that does two tasks by a known route."""
    route = draw_route(seed)
    said = f"Capitals and pronouns by head {route.layer}.{route.head}"
    said += {"alone": " alone", "before": f", after MLP {route.mlp}", "after": f", then MLP {route.mlp}"}[route.way]
    known = tuple(Known("ability", {"task": task}, holds=False) for task in TASKS if task not in TAUGHT)
    known += tuple(one for task in TAUGHT for one in route.known(task))
    subject = open_model(taught(route, seed), tokenizer=task_tokenizer())
    return Specimen(subject, Card("routed", seed, f"{said}; nothing else writes.", known))


def untaught(seed: int) -> Specimen:
    """The same wiring, trained on the same prompts with random answers."""
    known = tuple(Known("ability", {"task": task}, holds=False) for task in TASKS)
    subject = open_model(taught(draw_route(seed), seed, shuffled=True), tokenizer=task_tokenizer())
    return Specimen(subject, Card("routed", seed, "The same wiring, trained on random answers.", known))


PHANTOMS: tuple[Phantom, ...] = (
    Phantom("routed", "trained", "Two tasks by one known head", routed, untaught),
)  # fmt: skip
"""The phantoms that were taught through known parts."""
