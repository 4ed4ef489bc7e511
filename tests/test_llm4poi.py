"Histories of LLM4POI: chosen as a plain loop would, never from the future, whole in the prompts, the same after a stop."
import collections, math, re

import numpy as np, pandas as pd, pytest

from recnb.poi import checkins, llm4poi, prompts, trajectories
from recnb.poi.baselines import opened
from recnb.stages import BadInput, make


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    C = checkins.run(make(checkins.Params, dict(dataset="made", users=14, pois=30, days=40, seed=3, out=str(d/"c"))))
    return trajectories.run(make(trajectories.Params, dict(checkins=C.path, out=str(d/"t"))))


def chosen(city, d, **more): return llm4poi.run(make(llm4poi.Params, dict(trajectories=city.path, out=str(d), **more)))
def table(a): return pd.read_parquet(a/"history.parquet")


def by_loops(c, most, budget):
    "The same choice with dictionaries and loops."
    walks = [g for _, g in c.rows[c.rows.split == "train"].groupby(["split", "user_id", "trajectory"], sort=False)]
    walks = sorted(walks, key=lambda g: (g.seconds.max(), g.seconds.min()))
    words = lambda rows: [w for r in rows.itertuples() for w in (f"p{r.poi_id}", f"c{r.category_id}", f"h{r.local_time.hour}")]
    texts = [words(g) for g in walks]
    df = collections.Counter(w for t in texts for w in set(t))
    def vector(t):
        v = {w: n * (math.log((1 + len(texts)) / (1 + df[w])) + 1) for w, n in collections.Counter(t).items() if w in df}
        size = math.sqrt(sum(x * x for x in v.values())) or 1
        return {w: x / size for w, x in v.items()}
    queries, out = [vector(t) for t in texts], []
    for i in c.instances.itertuples():
        key, begin = vector(words(c.rows.loc[i.prefix])), c.rows.seconds[i.prefix].min()
        scored = sorted((-round(sum(x * q.get(w, 0) for w, x in key.items()), 9), -j) for j, q in enumerate(queries) if walks[j].seconds.max() < begin)[:most]
        room, told = budget - len(i.prefix), []
        for _, j in scored:
            if room <= 0: break
            told.append((-j, walks[-j].index.tolist()[-room:])); room -= len(told[-1][1])
        out.append([r for _, rows in sorted(told) for r in rows])
    return out


def test_as_loops_would(city, tmp_path):
    found = table(chosen(city, tmp_path/"a", most=5, budget=20))
    assert [list(r) for r in found.rows] == by_loops(opened(city.path), 5, 20)


@pytest.mark.parametrize("more", [dict(), dict(mode="last"), dict(until="now"), dict(mode="last", until="now")])
def test_only_the_past(city, tmp_path, more):
    c, found = opened(city.path), table(chosen(city, tmp_path/"a", budget=30, **more))
    seconds, split, users = (c.rows[k].to_numpy() for k in ("seconds", "split", "user_id"))
    assert found.instance_id.tolist() == c.instances.instance_id.tolist() and found.rows.map(len).sum() > 0
    for r, i in zip(found.rows, c.instances.itertuples()):
        assert len(r) + len(i.prefix) <= max(30, len(i.prefix)) and i.target_row not in r and not set(r) & set(i.prefix)
        assert len(r) == 0 or seconds[r].max() < seconds[i.prefix].min()
        if more.get("until") != "now": assert set(split[r]) <= {"train"}
        if more.get("mode") == "last": assert set(users[r]) <= {i.user_id}


def test_planted_future_changes_nothing_and_is_caught(city, tmp_path):
    "Check-ins of the target's own place, put right after each trajectory's begin, are seen by a builder that looks at the end alone."
    c = opened(city.path)
    test = c.instances[c.instances.split == "test"].iloc[-1]
    at, begin = c.rows.loc[test.target_row], c.rows.seconds[test.prefix].min()
    planted = pd.DataFrame([at.to_dict() | dict(user_id=99, trajectory="x", split="train", seconds=begin + k, poi_id=at.poi_id) for k in (0, 1)])
    rows = pd.concat([c.rows, planted], ignore_index=True)
    p = llm4poi.Params("", "", most=10**6, budget=10**6)
    found = llm4poi.histories(c._replace(rows=rows), p, tmp_path).set_index("instance_id")
    assert not set(found.rows[test.instance_id]) & {len(rows) - 1, len(rows) - 2}
    with pytest.raises(BadInput, match=f"instance {test.instance_id}"):
        llm4poi.check_past(c._replace(rows=rows), pd.DataFrame(dict(instance_id=[test.instance_id], rows=[[len(rows) - 1]])))


def test_block_of_the_prompts(city, tmp_path):
    def made(out, **more): return prompts.run(make(prompts.Params, dict(trajectories=city.path, profile="none", out=str(tmp_path/out), **more)))
    H = chosen(city, tmp_path/"h", budget=15)
    plain, told, history = (pd.read_parquet(f) for f in (made("a")/"test.parquet", made("b", history=str(H.path))/"test.parquet", H/"history.parquet"))
    rows, n = opened(city.path).rows, history.set_index("instance_id").rows.map(len)
    assert (plain.completion == told.completion).all() and n[told.instance_id].max() > 0
    for a, b in zip(plain.itertuples(), told.itertuples()):
        assert len(prompts.TIME.findall(b.prompt)) == len(prompts.TIME.findall(a.prompt)) + n[b.instance_id]
        block = b.prompt.removeprefix(a.prompt[:len(__import__("os").path.commonprefix([a.prompt, b.prompt]))])
        if n[b.instance_id] == 0: assert a.prompt == b.prompt
        else: assert all(f"POI {rows.poi_id[r]}," in block for r in history.set_index("instance_id").rows[b.instance_id])


def test_a_history_of_other_instances_is_refused(city, tmp_path):
    H = chosen(city, tmp_path/"h", budget=15)
    with pytest.raises(BadInput, match="a history for every instance"): prompts.with_history(pd.DataFrame(dict(instance_id=[10**6])), H.path)


def test_model_features_go_on_after_a_stop(city, tmp_path, monkeypatch):
    whole, calls, feature = table(chosen(city, tmp_path/"a", encoder="tiny-llama", most=3, budget=10)), [], llm4poi.feature
    def stops(*args):
        calls.append(1)
        if len(calls) == 100: raise KeyboardInterrupt
        return feature(*args)
    monkeypatch.setattr(llm4poi, "feature", stops)
    with pytest.raises(KeyboardInterrupt): chosen(city, tmp_path/"b", encoder="tiny-llama", most=3, budget=10)
    again = table(chosen(city, tmp_path/"b", encoder="tiny-llama", most=3, budget=10))
    assert again.equals(whole)


def test_new_york(data, tmp_path):
    "Similar trajectories are mostly other people's; nearly every test has some."
    C = checkins.run(make(checkins.Params, dict(dataset="nyc", data=str(data/"nyc"), out=str(tmp_path/"c"))))
    T = trajectories.run(make(trajectories.Params, dict(checkins=C.path, out=str(tmp_path/"t"))))
    H = chosen(T, tmp_path/"h", budget=100)
    t, c = table(H).query("split == 'test'"), opened(T.path)
    room = 100 - c.instances.set_index("instance_id").prefix.map(len)[t.instance_id].to_numpy()
    assert len(t) == 1429 and (t.rows.map(len).to_numpy()[room > 0] > 0).all() and 0 < H.facts["own"] < 1
