"Metrics on inputs nobody chose: bounds, invariances, and agreement with the plain way."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.metrics import (
    bootstrap,
    compare_by_bootstrap,
    discount_gains,
    find_hits,
    holm,
    mae,
    mcnemar,
    measure_ranking,
    measure_ratings,
    resample_statistic,
    rmse,
    wilson,
)

ranks = st.lists(st.one_of(st.none(), st.integers(1, 5000)), min_size=1, max_size=60)


def acc_at_k(r, k=1):
    return measure_ranking(r, ks=(k,), n=1)[f"Acc@{k}"]["value"]


def mrr(r):
    return measure_ranking(r, n=1)["MRR"]["value"]


def ndcg_at_10(r):
    return measure_ranking(r, n=1)["NDCG@10"]["value"]


quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(ranks)
def test_ranking_metrics_equal_their_plain_definitions(r):
    n = len(r)
    for k in (1, 5, 10, 20):
        assert acc_at_k(r, k) == sum(x is not None and x <= k for x in r) / n
    assert math.isclose(mrr(r), sum(1 / x for x in r if x) / n, abs_tol=1e-12)
    assert math.isclose(
        ndcg_at_10(r), sum(1 / math.log2(x + 1) for x in r if x and x <= 10) / n, abs_tol=1e-12
    )


@quick
@given(ranks, st.randoms())
def test_order_does_not_matter_and_lists_only_help(r, random):
    shuffled = random.sample(r, len(r))
    assert acc_at_k(r, 5) == acc_at_k(shuffled, 5) and math.isclose(mrr(r), mrr(shuffled))
    assert acc_at_k(r, 1) <= acc_at_k(r, 5) <= acc_at_k(r, 10) <= acc_at_k(r, 20)
    assert acc_at_k(r, 1) <= ndcg_at_10(r) <= acc_at_k(r, 10) and acc_at_k(r, 1) <= mrr(r)


@quick
@given(ranks)
def test_an_unranked_target_counts_as_a_miss(r):
    assert acc_at_k(r + [None], 20) * (len(r) + 1) == pytest.approx(acc_at_k(r, 20) * len(r))
    assert find_hits(r + [float("nan")], 20)[-1] == 0 and discount_gains(r + [None])[-1] == 0
    assert measure_ranking(r + [None], n=20)["Acc@1"]["n"] == len(r) + 1


@quick
@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_in_bounds(case):
    h, n = case
    low, high = wilson(h, n)
    if not n:
        return
    assert 0 <= low <= h / n + 1e-12 and h / n - 1e-12 <= high <= 1
    assert wilson(n - h, n) == pytest.approx((1 - high, 1 - low))
    wider = wilson(h, n, level=0.99)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        low <= 0.25 <= high for low, high in (wilson(h, 100) for h in rng.binomial(100, 0.25, 4000))
    ]
    assert 0.93 < np.mean(inside) < 0.97


def test_the_bootstrap_covers_a_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = [
        low <= 1 <= high
        for low, high in (bootstrap(rng.exponential(size=150), n=300, seed=i) for i in range(300))
    ]
    assert 0.89 < np.mean(inside) < 0.98


def test_the_bootstrap_needs_little_memory_and_repeats_itself():
    import tracemalloc

    x = np.random.default_rng(0).random(13_244)
    tracemalloc.start()
    first = bootstrap(x, n=1000, seed=7)
    assert (
        tracemalloc.get_traced_memory()[1] < 400e6
    )  # all draws at once would take 2 × 106 MB per array, and several
    tracemalloc.stop()
    assert first == bootstrap(x, n=1000, seed=7)
    assert (
        resample_statistic(x[:50], np.mean, 10, 1, block=60)
        == resample_statistic(x[:50], np.mean, 10, 1)
    ).all()


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_symmetric_and_blind_to_agreement(pairs):
    a, b = zip(*pairs)
    there, back = mcnemar(a, b), mcnemar(b, a)
    assert there["p"] == back["p"] and (there["b"], there["c"]) == (back["c"], back["b"])
    assert mcnemar(a + (True,) * 9, b + (True,) * 9) == there and 0 < there["p"] <= 1


def test_mcnemar_gives_the_known_value_of_the_published_ablation():
    assert mcnemar([1] * 23 + [0] * 22, [0] * 23 + [1] * 22)["p"] == 1
    assert mcnemar([1] * 366 + [0] * 194, [0] * 366 + [1] * 194)["p"] == pytest.approx(
        3.26e-13, rel=0.01
    )


def test_the_paired_bootstrap_sees_what_the_unpaired_misses():
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    a = base + 0.05 + rng.normal(0, 0.05, 400)
    b = base
    paired = compare_by_bootstrap(a, b)
    assert paired["low"] > 0 and paired["p"] < 0.01
    assert bootstrap(a)[0] < bootstrap(b)[1]  # on their own the intervals overlap


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_rejects_more_than_no_correction_nor_less_than_bonferroni(ps):
    adjusted = holm(ps)
    assert all(p <= q + 1e-12 and q <= min(1, p * len(ps)) + 1e-12 for p, q in zip(ps, adjusted))
    assert [q for _, q in sorted(zip(ps, adjusted))] == sorted(adjusted)


def test_rating_metrics():
    assert mae([3, 4], [3, 2]) == 1 and rmse([3, 4], [3, 2]) == math.sqrt(2)
    found = measure_ratings([3.0] * 50, [1, 5] * 25)
    assert found["RMSE"] == dict(value=2.0, low=2.0, high=2.0, n=50)


@pytest.mark.parametrize("bad", [[0], [-3, 1], [0.5]])
def test_a_rank_below_one_is_refused(bad):
    with pytest.raises(ValueError, match="starts at 1"):
        acc_at_k(bad)
