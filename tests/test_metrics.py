"Metrics on inputs nobody chose: bounds, invariances, and agreement with the plain way."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.metrics import (
    bootstrap,
    bootstrap_users,
    compare_means,
    compare_shares,
    count_rows_needed,
    discount_gains,
    estimate_share,
    find_hits,
    holm,
    mae,
    mcnemar,
    measure_ranking,
    measure_ratings,
    permute_users,
    resample_statistic,
    resample_users,
    rmse,
    wilson,
)

ranks = st.lists(st.one_of(st.none(), st.integers(1, 5000)), min_size=1, max_size=60)


def acc_at_k(r, k=1):
    return measure_ranking(r, ks=(k,), n=1)[f"Acc@{k}"]["value"]


def mrr(r):
    return measure_ranking(r, n=1, deep=True)["MRR"]["value"]


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
    paired = compare_means(a, b, range(400), n=1000)
    assert paired["users_low"] > 0 and paired["users_p"] < 0.01
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


def draw_town(rng, users=150, spread=0.35):
    "Hits of users of whom some are easy and some are hard, 1 to 15 instances each."
    who = np.repeat(np.arange(users), rng.integers(1, 16, users))
    easy = np.clip(0.3 + spread * rng.normal(size=users), 0, 1)
    return rng.random(len(who)) < easy[who], who, easy


def test_an_interval_over_users_covers_where_wilson_does_not():
    "What it should hold is the mean over users and their numbers, which the made towns know."
    rng = np.random.default_rng(0)
    truth = np.clip(0.3 + 0.35 * rng.normal(size=10**6), 0, 1).mean()
    over_users, over_instances = [], []
    for seed in range(200):
        right, who, _ = draw_town(rng)
        low, high = bootstrap_users(right, who, n=600, seed=seed)
        over_users.append(low <= truth <= high)
        low, high = wilson(int(right.sum()), len(right))
        over_instances.append(low <= truth <= high)
    assert np.mean(over_users) > 0.9 and np.mean(over_instances) < 0.75


def test_exchanging_users_rejects_the_truth_as_often_as_it_says():
    "Two methods that differ by user and not on the whole: McNemar is wrong too often."
    rng = np.random.default_rng(1)
    found = []
    for seed in range(300):
        who = np.repeat(np.arange(60), 10)
        better = rng.random(60) < 0.5
        a = rng.random(600) < np.where(better, 0.5, 0.2)[who]
        b = rng.random(600) < np.where(better, 0.2, 0.5)[who]
        found.append((permute_users(a, b, who, n=300, seed=seed), mcnemar(a, b)["p"]))
    ours, plain = (np.array(found) < 0.05).mean(0)
    assert ours < 0.09 and plain > 0.15


@quick
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.randoms(),
)
def test_numbers_over_users_do_not_depend_on_the_order_or_the_names_of_rows(rows, random):
    def all_numbers(rows):
        who, a, b = zip(*rows)
        share = estimate_share(a, who)
        return [share[k] for k in ("users", "users_low", "users_high")], compare_shares(a, b, who)

    share, both = all_numbers(rows)
    assert (share, both) == all_numbers(random.sample(rows, len(rows))) or len(rows) == 1
    assert share[1] is None or 0 <= share[1] <= share[2] <= 1
    turned = compare_shares(*zip(*[(b, a) for _, a, b in rows]), [w for w, *_ in rows])
    assert turned["users_p"] == both["users_p"] and turned["difference"] == -both["difference"]


@pytest.mark.parametrize("n", [1, 7, 9, 12, 511, 1020])
def test_where_all_are_right_the_interval_ends_at_one(n):
    "A share of 1 on 9 instances ended a study; and a bootstrap of equal values claims certainty."
    for users in (None, range(n), ["a"] * n):
        found = estimate_share([True] * n, users)
        assert found["value"] == found["high"] == 1 and found.get("users_high", 1) == 1
        assert found.get("users_low", 0) < 1


def test_draws_over_users_need_little_memory_and_repeat_themselves():
    import tracemalloc

    rng = np.random.default_rng(0)
    who = rng.integers(0, 5000, 20_000)
    tracemalloc.start()
    first = resample_users(rng.random((20_000, 2)), who, 500, 7)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    assert first.shape == (500, 2) and abs(first.mean() - 0.5) < 0.01
    assert count_rows_needed() == 778
