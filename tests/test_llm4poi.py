"LLM4POI: histories as by loops, never of the future, whole in prompts, the same after a stop."

import collections
import json
import math

import pandas as pd
import pytest

from recnb.artifacts import Artifact, load_artifact
from recnb.models import encode_texts, load_tokenizer
from recnb.poi import analyses, checkins, llm4poi, prompts, sft, trajectories
from recnb.poi.city import load_city
from recnb.poi.templates import build_prompts
from recnb.stages import BadInput


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    C = checkins.run(
        dataset="made", num_users=14, num_pois=30, num_days=40, seed=3, out=str(d / "c")
    )
    return trajectories.run(checkins=C.path, out=str(d / "t"))


def chosen(city, d, **more):
    return llm4poi.run(trajectories=city.path, out=str(d), **more)


def table(a):
    return pd.read_parquet(a / "history.parquet")


def check(instance, rows, told):
    "Refuse a history of an instance, as the stage would."
    one = pd.DataFrame([instance]).assign(history=[told])
    trajectories.check_histories(one, rows, ("seconds", "local_time"))


def by_loops(c, most, budget):
    "The same choice with dictionaries and loops."
    walks = [
        g
        for _, g in c.rows[c.rows.split == "train"].groupby(
            ["split", "user_id", "trajectory"], sort=False
        )
    ]
    walks = sorted(walks, key=lambda g: (g.seconds.max(), g.seconds.min()))

    def words(rows):
        return [
            w
            for r in rows.itertuples()
            for w in (f"p{r.poi_id}", f"c{r.category_id}", f"h{r.local_time.hour}")
        ]

    texts = [words(g) for g in walks]
    df = collections.Counter(w for t in texts for w in set(t))

    def vector(t):
        v = {
            w: n * (math.log((1 + len(texts)) / (1 + df[w])) + 1)
            for w, n in collections.Counter(t).items()
            if w in df
        }
        size = math.sqrt(sum(x * x for x in v.values())) or 1
        return {w: x / size for w, x in v.items()}

    queries = [vector(t) for t in texts]
    out = []
    for i in c.instances.itertuples():
        key = vector(words(c.rows.loc[i.prefix]))
        begin = c.rows.seconds[i.prefix].min()
        scored = sorted(
            (-round(sum(x * q.get(w, 0) for w, x in key.items()), 9), -j)
            for j, q in enumerate(queries)
            if walks[j].seconds.max() < begin
        )[:most]
        room = budget - len(i.prefix)
        told = []
        for _, j in scored:
            if room <= 0:
                break
            told.append(walks[-j].index.tolist()[-room:])
            room -= len(told[-1])
        out.append(sorted(sum(told, []), key=lambda r: (c.rows.seconds[r], r)))
    return out


def test_as_loops_would(city, tmp_path):
    found = table(chosen(city, tmp_path / "a", max_trajectories=5, max_checkins=20))
    assert [list(r) for r in found.rows] == by_loops(load_city(city.path), 5, 20)


@pytest.mark.parametrize(
    "more",
    [dict(), dict(mode="last"), dict(history_until="now"), dict(mode="last", history_until="now")],
)
def test_only_the_past(city, tmp_path, more):
    c = load_city(city.path)
    found = table(chosen(city, tmp_path / "a", max_checkins=30, **more))
    seconds, split, users = (c.rows[k].to_numpy() for k in ("seconds", "split", "user_id"))
    assert (
        found.instance_id.tolist() == c.instances.instance_id.tolist()
        and found.rows.map(len).sum() > 0
    )
    for r, i in zip(found.rows, c.instances.itertuples()):
        assert (
            len(r) + len(i.prefix) <= max(30, len(i.prefix))
            and i.target_row not in r
            and not set(r) & set(i.prefix)
        )
        assert len(r) == 0 or seconds[r].max() < seconds[i.prefix].min()
        if more.get("history_until") != "now":
            assert set(split[r]) <= {"train"}
        if more.get("mode") == "last":
            assert set(users[r]) <= {i.user_id}
    walks = c.rows.trajectory.astype(str).to_numpy()
    for r, sources, ended in zip(found.rows, found.sources, found.ended):
        assert set(sources) == set(walks[r]) and (
            len(r) == 0 or ended.timestamp() == seconds[r].max()
        )


def test_a_long_past_is_cut_from_its_begin(city, tmp_path):
    c, (short, long) = (
        load_city(city.path),
        (table(chosen(city, tmp_path / str(n), mode="last", max_checkins=n)) for n in (8, 10**6)),
    )
    for cut, whole, i in zip(short.rows, long.rows, c.instances.itertuples()):
        room = max(0, 8 - len(i.prefix))
        assert list(cut) == list(whole)[len(whole) - min(room, len(whole)) :]
    assert max(map(len, long.rows)) > 8


def test_a_repeated_hour_is_not_told(city, tmp_path):
    "The clock is put back before a trajectory: what reads as later than its begin falls away."
    c = load_city(city.path)
    i = c.instances[c.instances.split == "test"].iloc[-1]
    begin = c.rows.seconds[i.prefix].min()
    late = c.rows.seconds.where(c.rows.split == "train").lt(begin) & (c.rows.index >= 0)
    last = c.rows.seconds[late].idxmax()
    rows = c.rows.copy()
    rows.loc[last, "local_time"] = rows.local_time[i.prefix].min() + pd.Timedelta("5min")
    p = llm4poi.Params("", "", max_trajectories=10**6, max_checkins=10**6)
    plain, put_back = (
        llm4poi.choose_histories(c._replace(rows=r), p, tmp_path)
        .set_index("instance_id")
        .rows[i.instance_id]
        for r in (c.rows, rows)
    )
    assert last in plain and put_back == [r for r in plain if r != last]
    with pytest.raises(BadInput):
        check(i, rows, plain)


def test_planted_future_changes_nothing_and_is_caught(city, tmp_path):
    "Check-ins of the target's place after the begin: a builder that looks at ends sees them."
    c = load_city(city.path)
    test = c.instances[c.instances.split == "test"].iloc[-1]
    at = c.rows.loc[test.target_row]
    begin = c.rows.seconds[test.prefix].min()
    planted = pd.DataFrame(
        [
            at.to_dict()
            | dict(user_id=99, trajectory="x", split="train", seconds=begin + k, poi_id=at.poi_id)
            for k in (0, 1)
        ]
    )
    rows = pd.concat([c.rows, planted], ignore_index=True)
    p = llm4poi.Params("", "", max_trajectories=10**6, max_checkins=10**6)
    found = llm4poi.choose_histories(c._replace(rows=rows), p, tmp_path).set_index("instance_id")
    assert not set(found.rows[test.instance_id]) & {len(rows) - 1, len(rows) - 2}
    with pytest.raises(BadInput, match=f"instance {test.instance_id}"):
        check(test, rows, [len(rows) - 1])


def test_block_of_the_prompts(city, tmp_path):
    def made(out, **more):
        return prompts.run(trajectories=city.path, profile="none", out=str(tmp_path / out), **more)

    H = chosen(city, tmp_path / "h", max_checkins=15)
    plain, told, history = (
        pd.read_parquet(f)
        for f in (
            made("a") / "test.parquet",
            made("b", llm4poi=str(H.path)) / "test.parquet",
            H / "history.parquet",
        )
    )
    rows = load_city(city.path).rows
    told_rows = history.set_index("instance_id").rows
    assert (plain.completion == told.completion).all() and told_rows[told.instance_id].map(
        len
    ).max() > 0

    def said(r):
        time, category = (
            f"{r.local_time:%Y-%m-%d %H:%M:%S}",
            f"{r.category} (category {r.category_id})",
        )
        return f"{time} user {r.user_id} went to POI {r.poi_id}, {category}."

    for a, b in zip(plain.itertuples(), told.itertuples()):
        block = " ".join(said(r) for r in rows.loc[list(told_rows[b.instance_id])].itertuples())
        before, question = a.prompt.rsplit(
            "\n", 1
        )  # the block stands between trajectory and question, everything else is as without it
        assert (
            b.prompt == f"{before}\nCheck-ins before that trajectory: {block}\n{question}"
            if block
            else a.prompt
        )
        assert "<<SYS>>" not in b.prompt


def test_a_history_in_short_by_a_plain_loop(city, tmp_path):
    "Weekday, hour and POI of what the user did before the trajectory; the oldest make room."
    H = chosen(city, tmp_path / "h", mode="last")
    given = dict(trajectories=city.path, llm4poi=H, profile="none", compact_history=True)
    given |= dict(tokenizer="tiny-llama", max_length=400)
    P = prompts.run(given, out=str(tmp_path / "p"))
    texts = pd.concat([pd.read_parquet(P / f"{split}.parquet") for split in ("train", "test")])
    compare_with_loops(texts, load_city(city.path), 400, load_tokenizer("tiny-llama"))
    assert P.facts["train histories cut"] > 0 and P.facts["test check-ins left out"] > 0
    plain = prompts.run(trajectories=city.path, profile="none", out=str(tmp_path / "plain"))
    some = dict(out="", model_checkpoint="tiny-llama", train_rows=16, batch_size=4)
    drawn = [
        sft.draw_training_prompts(sft.Params(prompts=a.path, batch_by="beginning", **some))
        for a in (P, plain)
    ]
    assert drawn[0].instance_id.tolist() == drawn[1].instance_id.tolist()
    with pytest.raises(BadInput, match="needs --llm4poi"):
        prompts.run({**given, "llm4poi": None}, out=str(tmp_path / "q"))
    similar = chosen(city, tmp_path / "s")
    with pytest.raises(BadInput, match="own check-ins"):
        prompts.run({**given, "llm4poi": similar}, out=str(tmp_path / "q"))


def compare_with_loops(texts, c, limit=None, tokenizer=None):
    "Each text against what a loop over all check-ins of its user says."
    rows, seconds = c.rows, c.rows.seconds
    by_id = c.instances.set_index("instance_id")

    def name_hour(t):
        return f"{'Mon Tue Wed Thu Fri Sat Sun'.split()[t.weekday()]} {t.hour:02d} POI"

    def count(*texts):
        return len(encode_texts(tokenizer, ["".join(texts)])[0])

    for r in texts.itertuples():
        i = by_id.loc[r.instance_id]
        mine = rows[(rows.user_id == i.user_id) & (rows.split == "train")]
        mine = mine[seconds[mine.index] < seconds[i.prefix].min()]
        mine = mine[mine.local_time < rows.local_time[i.prefix].min()]
        order = sorted(mine.index, key=lambda k: (seconds[k], k))
        said = [f"{name_hour(rows.local_time[k])} {rows.poi_id[k]}." for k in order]
        before, _, rest = r.prompt.partition(": ")
        history = rest.partition("\n")[0]
        told = 0 if history == "none." else history.count(" POI ")
        assert before.endswith(f"Earlier check-ins of user {i.user_id}, weekday and hour")
        assert history == (" ".join(said[len(said) - told :]) or "none.")
        assert r.prompt.endswith(f"\nNext: {name_hour(i.target_time)}? [/INST] ")
        length = limit and count(r.prompt, r.completion)
        if limit is None:
            assert told == min(len(said), 600 - len(i.prefix))
        elif told < len(said):  # no room for one more, and no more than there was room for
            more = f"{said[-told - 1]} " if told else said[-1].removesuffix("none.")
            assert length + count(more) > limit
        assert limit is None or told == 0 or length <= limit


def test_labels(city, tmp_path):
    H = chosen(city, tmp_path / "h", mode="last", max_checkins=15)

    def ran(stage, **p):
        return Artifact(tmp_path, dict(stage=f"poi.{stage}", parameters=p, facts={}))

    def label(**p):
        model, tuned = ran("evaluate", model_checkpoint="m"), ran("sft", num_epochs=3)
        found = analyses.label_language_model(model, tuned, ran("prompts", **p))
        return found["method"], found["settings"]

    last = {"llm4poi.mode": "last", "max_checkins": 15}
    assert label(profile="none") == ("LLM4POI*", {})
    assert label(profile="none", llm4poi=str(H.path)) == ("LLM4POI", last)
    both = label(profile="full", llm4poi=str(H.path))
    assert both == ("LLM4POI", last | dict(profile="full"))
    assert label(profile="full") == ("GenUP", {})
    short = label(profile="none", llm4poi=str(H.path), compact_history=True, max_length=400)
    assert short == ("own history", {"max_checkins": 15, "prompts.max_length": 400})
    S = chosen(city, tmp_path / "s")
    assert label(profile="none", llm4poi=str(S.path)) == ("LLM4POI", {})


def test_facts_are_those_of_the_table(city, tmp_path):
    H = chosen(city, tmp_path / "h", max_checkins=15)
    t, facts = (
        table(H).query("split == 'test'"),
        json.loads((H / "history.json").read_text())["test"],
    )
    assert (
        facts["instances"] == len(t)
        and facts["with_history"] == round((t.rows.map(len) > 0).mean(), 4)
        and facts["own"] == round(t.own.sum() / t.rows.map(len).sum(), 4)
    )


def test_a_history_of_other_instances_is_refused(city, tmp_path):
    H = chosen(city, tmp_path / "h", max_checkins=15)
    with pytest.raises(BadInput, match="a history for every instance"):
        prompts.attach_history(pd.DataFrame(dict(instance_id=[10**6])), H.path)
    C = checkins.run(
        dataset="made", num_users=14, num_pois=30, num_days=40, seed=4, out=str(tmp_path / "c")
    )
    T = trajectories.run(checkins=C.path, out=str(tmp_path / "t"))
    with pytest.raises(BadInput, match="descend from different versions of poi.checkins"):
        prompts.run(
            trajectories=T.path, profile="none", llm4poi=str(H.path), out=str(tmp_path / "p")
        )


def test_model_features_go_on_after_a_stop(tmp_path, monkeypatch):
    C = checkins.run(
        dataset="made", num_users=8, num_pois=15, num_days=25, seed=3, out=str(tmp_path / "c")
    )
    city = trajectories.run(checkins=C.path, out=str(tmp_path / "t"))
    whole, calls, feature = (
        table(
            chosen(city, tmp_path / "a", encoder="tiny-llama", max_trajectories=3, max_checkins=10)
        ),
        [],
        llm4poi.extract_feature,
    )

    def stops(*args):
        calls.append(1)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return feature(*args)

    monkeypatch.setattr(llm4poi, "extract_feature", stops)
    with pytest.raises(KeyboardInterrupt):
        chosen(city, tmp_path / "b", encoder="tiny-llama", max_trajectories=3, max_checkins=10)
    again = table(
        chosen(city, tmp_path / "b", encoder="tiny-llama", max_trajectories=3, max_checkins=10)
    )
    assert again.equals(whole)


def test_new_york(new_york, tmp_path):
    """Similar trajectories are mostly other people's, and nearly every test has some; in short the
    user's own are those of a loop, in its order, with its cut."""
    T = load_artifact(new_york / "trajectories")
    H = chosen(T, tmp_path / "h", max_checkins=100)
    t = table(H).query("split == 'test'")
    c = load_city(T.path)
    room = 100 - c.instances.set_index("instance_id").prefix.map(len)[t.instance_id].to_numpy()
    assert (
        len(t) == 1429
        and (t.rows.map(len).to_numpy()[room > 0] > 0).all()
        and 0 < H.facts["own"] < 1
    )
    own = table(chosen(T, tmp_path / "own", mode="last"))
    assert own.rows.map(len).groupby(own["split"]).median()["test"] > 80
    some = c.instances.assign(history=own.rows)[::100]
    compare_with_loops(build_prompts(some, c.rows, {}, "none", compact=True), c)
