"""Dashboards against loops written out over dense codes; runs that are killed; hostile tokens; the index."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.features.parts import coder, embedded, texts, trained_coder
from tomoscope.errors import DataError
from tomoscope.features import (
    CodeStore,
    DashboardOptions,
    FeatureBook,
    FeatureIndex,
    build_index,
    harvest_codes,
    make_dashboards,
)
from tomoscope.features import codes as codes_module
from tomoscope.features.dashboard import logit_effects, rows_of
from tomoscope.scan.feature_page import feature_page

OPTIONS = DashboardOptions(top=4, per_quantile=2, bins=8, block=3000, cofire_tokens=700, segments=4)


@pytest.fixture(scope="module")
def rows():
    return rows_of(list(texts(20)), embedded(), length=48)


@pytest.fixture(scope="module")
def store(rows, tmp_path_factory):
    return harvest_codes(embedded(), trained_coder(), rows, tmp_path_factory.mktemp("codes"), shard_tokens=300)


@pytest.fixture(scope="module")
def book(store, tmp_path_factory):
    return FeatureBook.open(
        make_dashboards(embedded(), trained_coder(), store, tmp_path_factory.mktemp("book"), options=OPTIONS)
    )


@pytest.fixture(scope="module")
def dense(rows):
    one = trained_coder()
    parts = [one.encode(embedded().read([row], one.reads)[one.reads][0]) for row in rows]
    return torch.cat(parts).numpy()


def busiest(store: CodeStore, rank: int = 3) -> int:
    return int(np.argsort(-store.counts(), kind="stable")[rank])


def test_every_code_is_kept_with_its_place(store, rows, dense):
    assert store.shards > 2
    assert store.n_tokens == sum(map(len, rows)) == len(dense)
    entries = store.entries(0, store.n_features)
    again = np.zeros_like(dense)
    again[entries.place, entries.latent] = entries.value
    # which of two nearly equal codes is the k-th may differ between a batch and a single row
    assert (np.abs(again - dense) > 2e-2).mean() < 1e-4
    np.testing.assert_array_equal(store.counts(), (again > 0).sum(0))
    np.testing.assert_array_equal(store.text[0], np.concatenate(rows))
    blocks = list(store.blocks(2000))
    assert [a for a, _ in blocks[1:]] == [b for _, b in blocks[:-1]]
    assert blocks[-1][1] == store.n_features


def test_a_killed_harvest_goes_on_and_other_text_is_refused(rows, tmp_path, monkeypatch):
    one, calls = trained_coder(), []
    made = codes_module._parquet

    def dies(*parts):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*parts)

    monkeypatch.setattr(codes_module, "_parquet", dies)
    with pytest.raises(KeyboardInterrupt):
        harvest_codes(embedded(), one, rows, tmp_path, shard_tokens=300)
    with pytest.raises(DataError, match="no finished codes"):
        CodeStore.open(tmp_path)
    first = (tmp_path / "shard-00000.parquet").stat().st_mtime_ns
    again = harvest_codes(embedded(), one, rows, tmp_path, shard_tokens=300)
    assert (tmp_path / "shard-00000.parquet").stat().st_mtime_ns == first
    assert len(calls) == 3 + again.shards - 2
    with pytest.raises(DataError, match="another text"):
        harvest_codes(embedded(), one, [row[::-1] for row in rows], tmp_path, shard_tokens=300)
    with pytest.raises(DataError, match="whose dictionary is"):
        harvest_codes(embedded(), coder(192, 256), rows, tmp_path, reads=one.reads, shard_tokens=300)


def test_summaries_are_loops_written_out(store, book, rows):
    entries = store.entries(0, store.n_features)
    ids = np.concatenate(rows)
    codes = np.zeros((len(ids), store.n_features), dtype=np.float32)
    codes[entries.place, entries.latent] = entries.value
    for latent in (busiest(store, 0), busiest(store, 7), busiest(store, 60), int(np.argmin(store.counts()))):
        summary, own = book.summary(latent), codes[:, latent]
        on = np.flatnonzero(own > 0)
        assert summary["fires"] == len(on)
        assert summary["density"] == pytest.approx(len(on) / len(ids))
        if not len(on):
            assert book.contexts(latent) == []
            continue
        assert summary["max"] == pytest.approx(own.max())
        assert summary["mean"] == pytest.approx(own[on].mean(), rel=1e-5)
        expected = np.histogram(own[on], bins=8, range=(0, own.max()))[0]
        assert np.abs(np.array(summary["histogram"]) - expected).sum() <= 2  # an edge may round either way
        tokens, counts = np.unique(ids[on], return_counts=True)
        share = counts / counts.sum()
        assert summary["token_entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-5)
        assert summary["single_token"] == pytest.approx(share.max())
        assert summary["tokens"][0] in tokens[counts == counts.max()]
        assert summary["segments"] == np.bincount(on * 4 // len(ids), minlength=4).tolist()
        early = codes[:700] > 0
        both = (early & early[:, [latent]]).sum(0)
        either = (early | early[:, [latent]]).sum(0)
        jaccard = np.where(either > 0, both / np.maximum(either, 1), 0.0)
        jaccard[latent] = -1
        np.testing.assert_allclose(summary["cofire_jaccard"], np.sort(jaccard)[::-1][:5], atol=1e-6)
        with np.errstate(invalid="ignore", divide="ignore"):
            pearson = np.corrcoef(codes[:700].T)[latent]
            cosine = codes[:700].T @ codes[:700, latent] / np.linalg.norm(codes[:700], axis=0)
        told = [i for i in summary["correlated"] if i >= 0]
        together = [i for i in range(len(both)) if both[i] and i != latent]
        assert len(told) == min(5, len(together))
        assert set(told) <= set(together)
        np.testing.assert_allclose(summary["correlated_pearson"][: len(told)], pearson[told], atol=1e-4)
        np.testing.assert_allclose(
            summary["correlated_pearson"][: len(told)], np.sort(pearson[together])[::-1][:5], atol=1e-4
        )
        scale = np.linalg.norm(codes[:700, latent])
        np.testing.assert_allclose(summary["correlated_cosine"][: len(told)], cosine[told] / scale, atol=1e-4)
        row = trained_coder().W_dec[latent]
        assert set(summary["aligned"]) == set(row.abs().topk(5).indices.tolist())
        np.testing.assert_allclose(summary["aligned_by"], row[list(summary["aligned"])], rtol=1e-5)
        directions = torch.nn.functional.normalize(trained_coder().W_dec, dim=-1)
        cosine = directions[latent] @ directions.T
        cosine[latent] = -2
        np.testing.assert_allclose(summary["near_cosine"], cosine.topk(5).values, atol=1e-5)


def test_contexts_are_the_strongest_texts_and_a_draw_of_each_part(store, book, rows):
    latent = busiest(store)
    entries = store.entries(latent, latent + 1)
    starts = np.cumsum([0, *map(len, rows)])
    own = np.zeros(starts[-1])
    own[entries.place] = entries.value
    by_row = sorted((own[a:b].max() for a, b in pairwise(starts)), reverse=True)
    top = [context for context in book.contexts(latent) if context.bin == -1]
    np.testing.assert_allclose([context.values.max() for context in top], by_row[:4], rtol=1e-5)
    for context in book.contexts(latent):
        a = context.place - context.peak
        np.testing.assert_allclose(context.values, own[a : a + len(context.values)])
        np.testing.assert_array_equal(context.tokens, np.concatenate(rows)[a : a + len(context.tokens)])
        assert starts[context.row] <= a
        assert a + len(context.tokens) <= starts[context.row + 1]
        if context.bin >= 0:
            value = own[context.place]
            assert math.floor(min(value / own.max() * 5, 4.999)) == context.bin
    fire, still = book.drawn(latent, active=6, silent=5, exclude=[top[0].row])
    assert all(context.active for context in fire)
    assert not any(context.active for context in still)
    assert top[0].row not in {context.row for context in [*fire, *still]}


def test_logit_effects_are_the_heads_derivative():
    subject, one = embedded(), trained_coder()
    effects = logit_effects(subject, one)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(subject.facts.d_vocab, (4, 32), generator=generator).tolist()
    stream = subject.read(tokens, "layer.5.resid_post")["layer.5.resid_post"].flatten(0, 1).mean(0)
    point = stream.clone().requires_grad_()
    norm, head = subject.model.model.norm, subject.model.lm_head
    jacobian = torch.autograd.functional.jacobian(lambda x: head(norm(x)), point)
    expected = one.W_dec[:3] @ jacobian.T
    expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(effects(one.W_dec[:3]), expected, atol=2e-3 * float(expected.abs().max()), rtol=2e-2)
    assert logit_effects(subject, coder(8, 8)) is None


def test_blocks_do_not_change_the_answer_and_a_killed_run_goes_on(store, book, tmp_path, monkeypatch):
    whole = DashboardOptions(**{**vars(OPTIONS), "block": 10**9})
    other = FeatureBook.open(make_dashboards(None, trained_coder(), store, tmp_path / "one", options=whole))
    assert len(other.manifest["parts"]) == 1 < len(book.manifest["parts"])
    latent = busiest(store)
    assert [c.place for c in other.contexts(latent)] == [c.place for c in book.contexts(latent)]
    mine, theirs = other.summary(latent), book.summary(latent)
    assert all(
        mine[name] == theirs[name] for name in mine if name not in ("raised", "raised_by", "lowered", "lowered_by")
    )
    with pytest.raises(DataError, match="another dictionary, text or options"):
        make_dashboards(None, trained_coder(), store, tmp_path / "one", options=OPTIONS)
    with pytest.raises(DataError, match="another dictionary"):
        make_dashboards(None, coder(192, 256), store, tmp_path / "two")
    with pytest.raises(DataError, match="no finished"):
        FeatureBook.open(tmp_path / "two")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)


def test_the_page_escapes_what_is_hostile(store, book):
    class Hostile:
        def decode(self, ids):
            return f"</span><script>alert({ids[0]})</script>\"'\u202e\x00"

    card = book.card(busiest(store), Hostile(), label="<img src=x onerror=alert(1)>")
    page = feature_page(card | {"score": 0.8})
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img"} & tags.seen
    assert "\u202e" not in page
    assert "default-src 'none'" in page
    plain = feature_page(book.card(busiest(store), embedded().tokenizer))
    assert "unlabelled" in plain


def test_the_index_answers_by_word_token_and_text(store, book):
    a, b = busiest(store, 0), busiest(store, 5)
    build_index(book.folder, {a: ("Capitals of countries", 0.9), b: ("names of countries, often", None)})
    index = FeatureIndex(book.folder)
    assert [hit.latent for hit in index.about("capitals countries")] == [a, b]
    assert index.about("CAPITALS")[0].label == "Capitals of countries"
    assert index.about("nothing") == index.about("...") == []
    effects, top = logit_effects(embedded(), trained_coder())(trained_coder().W_dec), book.column("max")
    token = book.summary(a)["raised"][0]
    hits = index.raising(token)
    values = {hit.latent: hit.value for hit in hits}
    assert values[a] == pytest.approx(float(effects[a, token] * top[a]), rel=1e-3)
    assert [hit.value for hit in hits] == sorted(values.values(), reverse=True)
    x = embedded().read(texts(3)[2], trained_coder().reads)[trained_coder().reads][0]
    codes = trained_coder().sparse(x)
    found = index.active(codes, limit=5)
    assert len(found) == 5
    for hit in found:
        assert hit.value == pytest.approx(float(codes.value[codes.feature == hit.latent].max()))
    with pytest.raises(DataError, match="no feature"):
        index.lookup([10**6])
    index.close()


def test_nearest_directions_are_the_same_in_blocks(monkeypatch):
    from tomoscope.features import dashboard

    directions = torch.nn.functional.normalize(torch.randn(67, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = dashboard._nearest(directions, 5, 40, 4)
    monkeypatch.setattr(dashboard, "SIDE", 8)
    monkeypatch.setattr(dashboard, "PIECE", 8 * 13)
    pieces = dashboard._nearest(directions, 5, 40, 4)
    cosines = directions @ directions.T
    cosines.fill_diagonal_(-2)
    for found in (whole, pieces):
        np.testing.assert_allclose(found["near_cosine"], cosines[5:40].topk(4).values, atol=1e-6)
        np.testing.assert_array_equal(found["near"], cosines[5:40].topk(4).indices)
