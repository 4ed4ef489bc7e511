"A model's opinion of a ranker's list: ranks against plain loops, scores against the walk."

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from recnb.explore import find_answers
from recnb.poi import blend, evaluate, ranker
from recnb.poi.blend import choose_weight, match_opinions, rank_targets
from recnb.stages import BadInput


def make_opinions(rng, n=60):
    "Lists of unequal length with equal scores among them, and targets inside, outside and unknown."
    tops = [rng.permutation(30)[: rng.integers(1, 21)].tolist() for _ in range(n)]
    draw = [sorted(rng.integers(0, 5, len(x)) / 2, reverse=True) for x in tops]
    told = [(-rng.integers(0, 9, len(x)) / 4).tolist() for x in tops]
    targets = rng.integers(0, 32, n)
    ranks = [x.index(t) + 1 if t in x else None if t > 29 else 25 for x, t in zip(tops, targets)]
    ranked = pd.DataFrame(dict(instance_id=range(n), target_poi=targets, top=tops, logprob=draw))
    ranked["rank"] = pd.array(ranks, "Int64")
    return ranked, ranked[["instance_id", "top"]].assign(logprob=told)


def rank_by_loop(row, told, weight):
    if row.target_poi not in row.top:
        return row["rank"]
    total = [a + weight * b for a, b in zip(row.logprob, told)]
    order = sorted(range(len(total)), key=lambda i: (-total[i], i))
    return [row.top[i] for i in order].index(row.target_poi) + 1


@pytest.mark.parametrize("weight", [0, 0.25, 1])
def test_every_rank_is_that_of_plain_loops(weight):
    ranked, asked = make_opinions(np.random.default_rng(0))
    found = rank_targets(match_opinions(ranked, asked), weight)
    plain = [
        rank_by_loop(row, told, weight) for (_, row), told in zip(ranked.iterrows(), asked.logprob)
    ]
    assert [None if np.isnan(x) else x for x in found] == [None if pd.isna(x) else x for x in plain]
    written = blend.blend_rankings(match_opinions(ranked, asked), weight)
    assert written["rank"].isna().tolist() == [pd.isna(x) for x in plain]
    assert [sorted(x) for x in written.top] == [sorted(x) for x in ranked.top]
    assert all((np.diff(x) <= 0).all() for x in written.logprob)


def test_a_fold_has_no_part_in_its_own_weight():
    "Whatever the users of one fold answer, the weight that they are ranked with stays."
    ranked, asked = make_opinions(np.random.default_rng(1))
    both = match_opinions(ranked, asked)
    users = np.arange(len(ranked)) % 12
    folds = blend.assign_folds(users, 3, 42)
    weights = [0, 0.5, 2]

    def weights_of_folds(both):
        gains = [blend.discount_gains(rank_targets(both, w), 20) for w in weights]
        return [int(np.argmax([x[folds != k].sum().round(9) for x in gains])) for k in range(3)]

    before = weights_of_folds(both)
    for k in range(3):
        targets = ranked.target_poi.where(folds != k, 31)  # outside of every list
        changed = ranked.assign(target_poi=targets, rank=ranked["rank"].where(folds != k))
        assert weights_of_folds(match_opinions(changed, asked))[k] == before[k]
    lines = choose_weight(both, users, weights, 3).lines
    assert [x["folds"] for x in lines] == [before.count(i) for i in range(3)]


@pytest.fixture(scope="module")
def made(smoke):
    return smoke("poi")


def test_scores_of_candidates_are_those_of_the_walk(made, tmp_path):
    "By the search, in batches: as the walk over the whole catalogue gives them."
    run = made / "runs/alpha-full"
    given = dict(prompts=f"{run}/prompts", sft=f"{run}/sft", model_checkpoint="tiny-llama")
    given |= dict(candidates=str(made / "baselines/ranker/ranker"), first_rows=5)
    walk = evaluate.run(given, rank_limit=None, out=f"{tmp_path}/walk")
    batch = evaluate.run(given, batch_size=3, out=f"{tmp_path}/batch")
    slow, fast = map(evaluate.CANDIDATES.read, (walk, batch))
    assert slow.top.map(list).tolist() == fast.top.map(list).tolist()
    assert all(np.abs(np.subtract(*x)).max() < 1e-3 for x in zip(slow.logprob, fast.logprob))
    ranks = [evaluate.PREDICTIONS.read(x)["rank"] for x in (walk, batch)]
    assert ranks[1][ranks[0] <= 20].equals(ranks[0][ranks[0] <= 20])


def test_a_run_of_the_study_has_one_row_more(made):
    "The blend beside the model, tested against its ranker over users; its key names both."
    lines = [json.loads(x) for x in (made / "results.jsonl").read_text().splitlines()]
    rows = [x for x in lines if x["method"] == "LightGBM ranker + GenUP" and not x["slice"]]
    assert {x["against"] for x in rows} >= {"", "LightGBM ranker"}
    tests = [x["metric"] for x in rows if x["against"] == "LightGBM ranker"]
    assert "permutation p" in tests and len(tests) == len(set(tests))
    assert {x["where"] for x in rows} == {"runs/alpha-full/blend/manifest.json"}
    assert {"runs/alpha-full", "runs/alpha-full/blend"} < find_answers(made).keys()
    models = [x for x in lines if x["method"] == "GenUP" and x["metric"] == "Acc@1"]
    assert models and all("/evaluate/" in x["where"] for x in models if "runs/" in x["where"])


def test_what_does_not_belong_together_is_refused(made, tmp_path):
    p = blend.Params(
        trajectories=f"{made}/cities/alpha/trajectories",
        ranker=f"{made}/baselines/ranker/ranker",
        evaluate=f"{made}/runs/alpha-full/evaluate",
        evaluate_validation=f"{made}/runs/alpha-full/evaluate_validation",
        out=f"{tmp_path}/blend",
    )
    other = ranker.run(trajectories=p.trajectories, num_trees=10, seed=7, out=f"{tmp_path}/other")
    wrong = {
        "different versions of poi.ranker": dict(ranker=str(other.path)),
        "an evaluation of validation": dict(evaluate_validation=p.evaluate),
        "weights of 0 or more": dict(weights=[-1.0]),
    }
    for said, changed in wrong.items():
        with pytest.raises(BadInput, match=said):
            blend.run(dataclasses.replace(p, **changed))
