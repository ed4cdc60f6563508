"""Rules that were planted, scores against their formulas, models behind a local server, and whole runs."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from tests.features.parts import embedded, normal, texts, trained_coder
from tomoscope.errors import DataError, ResourceError
from tomoscope.features import (
    Cached,
    Context,
    DashboardOptions,
    Endpoint,
    FeatureBook,
    JumpReLU,
    Label,
    Labeller,
    LocalModel,
    ModelExplainer,
    ModelJudge,
    RuleExplainer,
    RuleJudge,
    SparseCoder,
    harvest_codes,
    index_labels,
    learn_rule,
    make_dashboards,
    plan_labels,
    read_labels,
    say_of,
)
from tomoscope.features.dashboard import rows_of
from tomoscope.features.label_models import marked, read_label, read_yes
from tomoscope.features.label_rules import Words
from tomoscope.features.label_scores import detection, feature_effect, fuzzing, intervention, simulation
from tomoscope.findings.roc import roc_area

WORDS = [" the", " city", " of", " Paris", " Lyon", " Rome", " was", " born", " in", " a", " Ann", " Bob"]
SITE = "layer.0.resid_pre"


def say(token: int) -> str:
    return WORDS[token]


def windows(fires, n: int = 60, seed: int = 0) -> list[Context]:
    """Random texts of the words above; `fires(tokens, i)` says the activation at token i."""
    rng = np.random.default_rng(seed)
    out = []
    for row in range(n):
        tokens = rng.integers(0, len(WORDS), 14)
        values = np.array([fires(tokens.tolist(), i) for i in range(len(tokens))], dtype=np.float32)
        out.append(Context(tokens, values, 0, 0, row))
    return out


@pytest.mark.parametrize(
    ("fires", "said"),
    [
        (lambda t, i: 2.0 * (t[i] == 3), 'the token " Paris"'),
        (lambda t, i: 1.0 * (t[i] in (3, 7)), 'the tokens " Paris", " born"'),
        (lambda t, i: 1.0 * (i > 0 and t[i - 1] == 8), 'after " in"'),
        (lambda t, i: 1.0 * (i > 1 and t[i - 2 : i] == [2, 0]), 'after " of the"'),
        (lambda t, i: 1.0 * (i == 4), "token 4 of the text"),
        (lambda t, i: 1.0 * (t[i] in (3, 4, 5)), "in a city"),
        (lambda t, i: 1.0 * (i > 0 and t[i - 1] in (3, 4, 5) and t[i] not in (3, 4, 5)), "right after a city"),
    ],
)
def test_planted_rules_are_found_in_words(fires, said):
    lexicon = {"city": {"Paris", "Lyon", "Rome"}, "name": {"Ann", "Bob"}}
    rule = learn_rule(windows(fires, 200), say=say, lexicon=lexicon)
    assert sorted(rule.text.replace(",", "").split()) == sorted(said.replace(",", "").split())
    for context in windows(fires, 20, seed=1):
        np.testing.assert_allclose(rule(context), context.values)


def test_noise_has_no_rule():
    rng = np.random.default_rng(3)
    rule = learn_rule(windows(lambda t, i: float(rng.random() < 0.02)), say=say)
    assert sum(float((rule(c) > 0).mean()) for c in windows(lambda t, i: 0.0)) / 60 < 0.2
    assert learn_rule(windows(lambda t, i: 0.0), say=say).text == ""


def test_words_of_several_tokens_have_attributes():
    pieces = ["New", " York", " is", " old", "New", "er"]
    context = Context(np.array([0, 1, 2, 4, 5, 3]), np.zeros(6, dtype=np.float32), 0, 0, 0)
    (mask,) = Words({"city": ["New York", "Newer"]}).masks([context], lambda t: pieces[t]).values()
    # "isNewer" has no border before it, so it is no word of the lexicon
    assert mask.tolist() == [True, True, False, False, False, False]


def test_scores_are_their_formulas():
    fires = lambda t, i: (1.0 + t[i] / 4) * (t[i] in (3, 4))  # noqa: E731
    contexts = windows(fires, 120)
    rule = learn_rule(contexts, say=say)
    label, judge = Label(rule.text, rule), RuleJudge()
    fresh = windows(fires, 80, seed=2)
    fire, still = [c for c in fresh if c.active], [c for c in fresh if not c.active]
    found = detection(judge, label, fire, still)
    assert found.value == roc_area([rule(c).max() for c in fire], [rule(c).max() for c in still]) == 1.0
    assert fuzzing(judge, label, fire, seed=0).value > 0.99
    wrong = learn_rule(windows(lambda t, i: 1.0 * (t[i] == 9)), say=say)
    other = detection(judge, Label(wrong.text, wrong), fire, still)
    assert abs(other.value - 0.5) < 0.2
    exact = simulation(judge, label, fresh, seed=0)
    x = np.concatenate([rule(c) for c in fresh])
    y = np.concatenate([c.values for c in fresh])
    assert exact.value == pytest.approx(pearsonr(x, y)[0], abs=1e-6)
    assert exact.low < exact.value < exact.high + 1e-9
    assert simulation(ModelJudge(None, say), label, fresh, seed=0).missing
    always = windows(lambda t, i: 1.0, 20)
    assert "most tokens" in fuzzing(judge, label, always, seed=0).missing


def test_marks_and_answers_are_read():
    context = Context(np.array([0, 3, 4, 8]), np.array([0, 1.0, 2.0, 0]), 1, 0, 0)
    assert marked(context, say, context.values > 0) == " the <<Paris Lyon>> in"
    assert marked(context, lambda t: "<<x>>") == "‹‹x››" * 4
    assert read_label('\n "Capitals."\nMore') == "Capitals"
    assert read_label("") == ""
    assert read_yes(["Yes.", " no", "perhaps"]).tolist() == [1.0, 0.0, 0.5]


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict]] = []
    fail: ClassVar[list[int]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.asked.append({"body": body, "key": self.headers.get("Authorization")})
        if Server.fail:
            self.send_response(Server.fail.pop())
            self.end_headers()
            return
        prompt = body["messages"][0]["content"]
        if "have in common" in prompt:
            answer = "Paris\n"
        elif "<<" in prompt:
            answer = "yes" if "<<Paris>>" in prompt else "no"
        else:
            answer = "Yes" if "Paris" in prompt.split("Text:")[1] else "No"
        reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.asked, Server.fail = [], []
    made = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    made.server_close()
    thread.join()


def test_an_endpoint_explains_and_judges_and_is_asked_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret")
    model = Cached(Endpoint(server, "small", key="TEST_KEY", pause=0.0), tmp_path / "answers.jsonl")
    contexts = windows(lambda t, i: 1.0 * (t[i] == 3), 40)
    fire, still = [c for c in contexts if c.active], [c for c in contexts if not c.active]
    Server.fail = [503, 429]
    label = ModelExplainer(model, say).explain(contexts)
    assert label.text == "Paris"
    assert len(Server.asked) == 3
    assert Server.asked[0]["key"] == "Bearer secret"
    assert Server.asked[0]["body"]["temperature"] == 0
    judge = ModelJudge(model, say)
    assert detection(judge, label, fire, still).value == 1.0
    assert fuzzing(judge, label, fire, seed=0).value > 0.9
    n = len(Server.asked)
    again = ModelJudge(Cached(Endpoint(server, "small", key="TEST_KEY"), tmp_path / "answers.jsonl"), say)
    assert detection(again, label, fire, still).value == 1.0
    assert len(Server.asked) == n
    assert "secret" not in (tmp_path / "answers.jsonl").read_text()
    Server.fail = [401]
    with pytest.raises(ResourceError, match="401"):
        model.ask(["new"], max_tokens=3)
    Server.fail = [500] * 4
    with pytest.raises(ResourceError, match="can't be reached"):
        model.ask(["new"], max_tokens=3)
    with pytest.raises(DataError, match="no address"):
        Endpoint("file:///etc/passwd", "x")
    with pytest.raises(DataError, match="NO_SUCH"):
        Endpoint(server, "x", key="NO_SUCH")


def test_a_local_model_answers_within_its_context():
    model = LocalModel(embedded())
    (answer,) = model.ask(["The capital of France is " * 200], max_tokens=3)
    assert isinstance(answer, str)
    assert ModelExplainer(model, say_of(embedded().tokenizer)).explain([]).text == ""


def token_coder(tokens: list[int]) -> SparseCoder:
    """A dictionary at the embedding with one feature a token, and one that never fires."""
    E = embedded().model.get_input_embeddings().weight.detach()
    rows = torch.cat([E[tokens], normal(1, E.shape[1])])
    W = (rows / rows.square().sum(-1, keepdim=True)).T.contiguous()
    W[:, -1] = 0
    return SparseCoder(
        W, rows, torch.zeros(len(rows)), torch.zeros(E.shape[1]), JumpReLU(torch.full((len(rows),), 0.999)), reads=SITE,
        name="tokens",
    )  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    rows = rows_of(list(texts(150)), embedded(), length=40)
    counts = np.bincount(np.concatenate(rows))
    per_row = np.array([sum(token in row for row in rows) for token in np.argsort(-counts)[:60]])
    common = np.argsort(-counts)[:60][(per_row < 0.6 * len(rows)) & (per_row > 25)][:8]
    coder = token_coder(common.tolist())
    folder = tmp_path_factory.mktemp("labels")
    store = harvest_codes(embedded(), coder, rows, folder / "codes")
    options = DashboardOptions(top=4, per_quantile=2)
    return FeatureBook.open(make_dashboards(None, coder, store, folder / "book", options=options)), coder, common


def test_every_planted_feature_gets_its_label_and_the_silent_one_none(book, tmp_path):
    pages, coder, common = book
    say = say_of(embedded().tokenizer)
    labeller = Labeller(
        pages, RuleExplainer(say), RuleJudge(), embedded(), coder, active=20, silent=20, shown=15, shuffles=2
    )
    path = tmp_path / "labels.jsonl"
    found = list(labeller.run(range(len(common) + 1), path))
    for one, token in zip(found[:-1], common, strict=True):
        assert one.label == f'the token "{say(int(token))}"', (one, say(int(token)))
        assert one.detection.value == 1.0
        assert one.detection.low > one.control["detection"].value
        assert one.single_token == 1.0
        assert one.token_entropy == 0.0
        assert one.intervention.value is None or one.intervention.value > 0.3
    assert found[-1].label == ""
    assert found[-1].detection.missing
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # killed in the middle of the fourth line
    again = list(labeller.run(range(len(common) + 1), path))
    assert again == found
    assert index_labels(read_labels(path))[0][0] == found[0].label
    with pytest.raises(DataError, match="by rules"):
        list(Labeller(pages, ModelExplainer(LocalModel(embedded()), say), RuleJudge()).run([0], path))


def test_a_wrong_label_is_refused(book):
    pages = book[0]

    class Wrong:
        name = "wrong"

        def explain(self, contexts):
            rule = learn_rule(windows(lambda t, i: 1.0 * (t[i] == 3)), say=say)
            return Label("Paris", rule)

    (found,) = Labeller(pages, Wrong(), RuleJudge(), active=20, silent=20, shuffles=1).run([0])
    assert found.label == ""
    assert found.proposed == "Paris"
    assert "does not lie above" in found.why_not


def test_intervention_is_a_rank_correlation_with_the_effect():
    subject, coder = embedded(), trained_coder()
    rows = rows_of(list(texts(12)), subject, length=24)[:14]
    latent = int(coder.sparse(subject.read(rows[0], coder.reads)[coder.reads][0]).feature[0])
    contexts = []
    for i, row in enumerate(rows):
        codes = coder.encode(subject.read([row], coder.reads)[coder.reads][0])[:, latent]
        contexts.append(Context(np.array(row), codes.numpy(), 0, 0, i))
    effects = feature_effect(subject, coder, latent, contexts, site=coder.reads)
    assert all((effect > 1e-9) <= context.active for effect, context in zip(effects, contexts, strict=True))

    class Knows:
        def applies(self, label, some):
            return np.array([context.values.max() for context in some])

    found = intervention(Knows(), Label("x"), contexts, subject, coder, latent, site=coder.reads, seed=0)
    own = [context.values.max() for context in contexts]
    assert found.value == pytest.approx(spearmanr(effects, own)[0], abs=1e-9)


def test_the_cost_is_told_beforehand():
    plan = plan_labels(1000, contexts=200, shuffles=0, price=(1.0, 2.0), tokens_per_second=1e5)
    assert plan.requests == 1000 * 401
    assert plan.cost == pytest.approx((plan.tokens_in + 2 * plan.tokens_out) / 1e6)
    assert plan.seconds == pytest.approx((plan.tokens_in + plan.tokens_out) / 1e5)
