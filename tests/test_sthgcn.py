"STHGCN: hypergraph and attention against loops, nothing of the future, training that resumes."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pretend import Pretended

from recnb.poi import checkins, trajectories
from recnb.poi.city import City, load_city
from recnb.poi.sthgcn import (
    Params,
    RateSchedule,
    attend_with_learned_query,
    attend_with_target_query,
    build_convolution,
    build_prefixes,
    build_sthgcn,
    collect_sources,
    compute_checkin_states,
    describe_spans,
    encode_checkins,
    find_neighbours,
    find_study_prefixes,
    find_train_prefixes,
    link_batch,
    link_checkins,
    link_neighbours,
    link_split,
    link_step,
    list_trajectories,
    make_train_round,
    rank_with_sthgcn,
    run,
    score_batch,
    select_neighbours,
    select_spans,
)

SMALL = dict(
    embedding_dim=4,
    num_heads=2,
    max_neighbours=6,
    batch_size=16,
    num_epochs=2,
    learning_rate=5e-3,
    eval_steps=15,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    checkins.run(
        checkins.Params(
            out=f"{d}/checkins", dataset="made", num_users=12, num_pois=40, num_days=45, seed=5
        )
    )
    trajectories.run(trajectories.Params(checkins=f"{d}/checkins", out=f"{d}/trajectories"))
    return d / "trajectories"


@pytest.fixture(scope="module")
def city(folder):
    return load_city(folder)


@pytest.fixture(scope="module")
def model(city):
    "Weights with normalisation that has seen something."
    model = build_sthgcn(
        Params("", "", **SMALL), len(city.users), len(city.catalogue), len(city.categories)
    )
    q, _ = build_prefixes(city, *find_train_prefixes(city, list_trajectories(city)))
    with torch.no_grad():
        score_drawn(
            Params("", "", **SMALL),
            model.train(),
            city,
            encode_checkins(city),
            select_spans(q, slice(0, 200)),
            collect_sources(city, list_trajectories(city)),
        )
    return model.eval()


def score_drawn(p, model, city, x, prefixes, sources):
    "Scores of a batch with neighbours that are drawn."
    batch = link_batch(p, city, prefixes, sources, np.random.default_rng(0))
    return score_batch(p, model, x, batch)


def scored(city, model, instances, **given):
    "The scores of all POIs by instance, best 20 with their ids."
    p = Params("", "", **SMALL | given)
    with torch.inference_mode():
        t = rank_with_sthgcn(
            p,
            model,
            city,
            encode_checkins(city),
            link_split(p, city, list_trajectories(city), instances),
        )
    return [dict(zip(a, b)) for a, b in zip(t.top, t.logprob)]


def test_every_later_check_in_is_a_question(city):
    found, rows = (
        {
            int(t): (int(a), int(b))
            for a, b, _, t in zip(*find_train_prefixes(city, list_trajectories(city)))
        },
        city.rows,
    )
    expected = {}
    for _, g in rows[rows.split == "train"].groupby(["user_id", "trajectory"]):
        for i, when in zip(g.index, g.local_time):
            before = g.index[g.local_time < when]
            if len(before):
                expected[i] = (before[0], before[-1] + 1)
    train = city.instances[city.instances.split == "train"]
    assert found == expected and len(found) > len(train)
    assert [found[r] for r in train.target_row] == [(p[0], p[-1] + 1) for p in train.prefix]


@pytest.mark.parametrize("history,jaccard", [("train", 0.005), ("train", 0.3), ("now", 0.1)])
def test_edges_are_those_of_loops(city, history, jaccard):
    tr = list_trajectories(city)
    whole = [city.rows.iloc[a:b] for a, b in zip(tr.start, tr.stop)]
    for given in (
        find_study_prefixes(city.instances[city.instances.split == "test"], tr),
        tuple(x[::9] for x in find_train_prefixes(city, tr)),
    ):
        q = build_prefixes(city, *given)[0]
        s = collect_sources(city, tr, history)
        to, of, kind = find_neighbours(q, s, jaccard)
        expected = set()
        for k, (a, b, t, _) in enumerate(zip(*given)):
            seen = city.rows.iloc[a:b]
            for n, g in enumerate(whole):
                if (
                    n == t
                    or g.seconds.max() > seen.seconds.min()
                    or (history == "train" and g.split.iloc[0] != "train")
                ):
                    continue
                A = set(seen.poi)
                B = set(g.poi)
                same = g.user.iloc[0] == seen.user.iloc[0]
                if same or len(A & B) / len(A | B) >= jaccard:
                    expected.add((k, n, int(not same)))
        assert (
            set(zip(to.tolist(), s.spans.trajectory[of].tolist(), kind.tolist())) == expected
            and len(to) == len(expected) > 50
        )
        some, who, _ = select_neighbours(to, of, kind, s, 3)
        for k in set(to.tolist()):
            assert sorted(s.spans.last[who[some == k]]) == sorted(s.spans.last[of[to == k]])[-3:]


@pytest.mark.parametrize("asks", [False, True])
def test_attention_and_its_gradients_are_those_of_loops(asks):
    torch.manual_seed(3)
    d = 10
    heads = 3
    n = 5
    conv = build_convolution(d, 12, heads, asks).double().eval()
    m, x, to = (
        torch.randn(40, d).double().requires_grad_(),
        torch.randn(n, d).double().requires_grad_(),
        torch.arange(40) % n,
    )
    fast = (
        attend_with_target_query(conv, x, m, to, 0.1)
        if asks
        else attend_with_learned_query(conv, m, to, n, 0.1)
    )
    K, V = (conv[k](m).view(-1, heads, d) for k in ("key", "value"))
    slow = []
    for i in range(n):
        mine = (to == i).nonzero()[:, 0]
        out = []
        for h in range(heads):
            r = conv["query"](x[i]).view(heads, d)[h] if asks else conv["asked"]["r"][h]
            score = K[mine, h] @ r
            a = (score / d**0.5 if asks else torch.nn.functional.leaky_relu(score, 0.2)).softmax(0)
            out.append(a @ V[mine, h] + (0 if asks else r))
        o = torch.cat(out)
        o = (
            conv["out"](0.5 * conv["skip"](x[i]) + 0.5 * o)
            if asks
            else conv["out"](conv["widen"](conv["layer_norm"](o)).relu())
        )
        slow.append(o / o.norm())
    slow = torch.stack(slow)
    w = torch.randn(n, d).double()
    assert torch.allclose(fast, slow, atol=1e-6)
    every = [
        m,
        *([x] if asks else []),
        *(t for k, t in conv.named_parameters() if not k.startswith("norm")),
    ]
    for a, b in zip(
        torch.autograd.grad((fast * w).sum(), every), torch.autograd.grad((slow * w).sum(), every)
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_score_does_not_depend_on_the_batch(city, model):
    test = city.instances[city.instances.split == "test"]
    together = scored(city, model, test)
    for i in (0, 3, len(test) - 1):
        alone = scored(city, model, test[i : i + 1])[0]
        assert list(alone) == list(together[i]) and np.allclose(
            list(alone.values()), list(together[i].values()), atol=1e-5
        )


def test_a_question_without_neighbours_keeps_its_own_state(city, model):
    p = Params("", "", **SMALL)
    tr = list_trajectories(city)
    x = encode_checkins(city)
    q, _ = build_prefixes(city, *find_train_prefixes(city, tr))
    s = collect_sources(city, tr)
    n = 40
    first = np.argsort(q.first, kind="stable")[:n]
    links = link_neighbours(p, select_spans(q, first), s)
    lonely = np.setdiff1d(np.arange(n), links.to.numpy())
    assert 0 < len(lonely) < n
    with torch.inference_mode():
        y = score_drawn(p, model, city, x, select_spans(q, first), s)
        own = model["head"](
            compute_checkin_states(
                p,
                model,
                x,
                link_checkins(city, select_spans(q, first), p.max_checkins_per_trajectory),
                "own",
            )
        )
        none = score_drawn(p, model, city, x, select_spans(q, first[lonely]), s)
    assert torch.allclose(y[lonely], own[lonely], atol=1e-6) and torch.allclose(
        none, own[lonely], atol=1e-6
    )
    linked_to = np.unique(links.to.numpy())
    assert not torch.allclose(y[linked_to], own[linked_to], atol=1e-2)
    score_drawn(p, model.train(), city, x, select_spans(q, first[lonely[:1]]), s).sum().backward()
    model.eval()


@pytest.mark.parametrize("history", ["train", "now"])
def test_nothing_from_the_future_reaches_a_score(city, model, history):
    "What a test may not see is overwritten with its answer: the score stays. The rest counts."
    tr = list_trajectories(city)
    other = int(city.rows.poi.mode()[0])
    for i in city.instances[city.instances.split == "test"].index[::4]:
        one = city.instances.loc[[i]]
        begin = city.rows.seconds.to_numpy()[one.prefix.iloc[0]].min()
        seen = (np.repeat(tr.last, tr.stop - tr.start) <= begin) & (
            (city.rows.split == "train") | (history == "now")
        ).to_numpy()
        allowed = seen | np.isin(np.arange(len(seen)), one.prefix.iloc[0])
        assert not allowed[one.target_row.iloc[0]]
        plain = scored(city, model, one, history_until=history)
        for answer in (one.target.iloc[0], other):
            rows = city.rows.assign(
                **{
                    c: np.where(allowed, city.rows[c], v)
                    for c, v in dict(poi=answer, cat=0, latitude=1.0, longitude=1.0).items()
                }
            )
            assert scored(city._replace(rows=rows), model, one, history_until=history) == plain
        assert (
            scored(
                city._replace(rows=city.rows.assign(poi=np.where(seen, other, city.rows.poi))),
                model,
                one,
                history_until=history,
            )
            != plain
        )


def test_a_train_question_does_not_see_its_answer(city, model):
    tr = list_trajectories(city)
    p = Params("", "", **SMALL)
    start, stop, trip, target = find_train_prefixes(city, tr)
    for k in range(5, len(start), 97):
        hidden = np.repeat(
            tr.last > city.rows.seconds.to_numpy()[start[k] : stop[k]].min(), tr.stop - tr.start
        )
        hidden[start[k] : stop[k]] = False
        assert hidden[target[k]]
        told = city._replace(
            rows=city.rows.assign(
                poi=np.where(hidden, city.rows.poi.to_numpy()[target[k]], city.rows.poi),
                latitude=np.where(hidden, 1.0, city.rows.latitude),
            )
        )
        with torch.inference_mode():
            a, b = (
                score_drawn(
                    p,
                    model,
                    c,
                    encode_checkins(c),
                    describe_spans(c, start[[k]], stop[[k]], trip[[k]]),
                    collect_sources(c, list_trajectories(c)),
                )
                for c in (city, told)
            )
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="before the target"):
        build_prefixes(city, start[:1], target[:1] + 1, trip[:1], target[:1])


def test_a_step_is_computed_on_a_device_and_never_waits_for_it(city):
    "The weights, the check-ins and the batch are all that is moved there."
    p = Params("", "", **SMALL)
    tr = list_trajectories(city)
    q, target = build_prefixes(city, *find_train_prefixes(city, tr))
    step = link_step(p, city, q, target, collect_sources(city, tr), 3)
    sizes = map(len, (city.users, city.catalogue, city.categories))
    model = build_sthgcn(p, *sizes).train()
    x = encode_checkins(city)
    with Pretended() as on:
        (batch, follow), there = on.put((step, x))
        y = score_batch(p, on.put_model(model), there, batch)
        torch.nn.functional.cross_entropy(y, follow).backward()
        assert all(w.grad.device.type == on.device for w in model.parameters())


def trained_weights(city):
    p = Params("", "", **SMALL)
    model = build_sthgcn(p, len(city.users), len(city.catalogue), len(city.categories))
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    torch.manual_seed(0)
    make_train_round(
        p,
        city,
        list_trajectories(city),
        encode_checkins(city),
        model.train(),
        adam,
        RateSchedule(adam, 100, 2),
    )[0](1)
    return torch.cat([t.detach().flatten() for t in model.parameters()])


def test_training_reads_train_alone(city):
    other = city.rows.split != "train"
    blind = city._replace(
        rows=city.rows.assign(
            poi=np.where(other, 0, city.rows.poi), latitude=np.where(other, 1.0, city.rows.latitude)
        )
    )
    seen = city._replace(rows=city.rows.assign(poi=np.where(other, city.rows.poi, 0)))
    plain = trained_weights(city)
    assert torch.equal(plain, trained_weights(blind)) and not torch.equal(
        plain, trained_weights(seen)
    )


def test_it_learns_who_goes_where():
    "Users walk a round of eight POIs, one way or the other: all tests are right after training."
    rng = np.random.default_rng(0)
    rows = []
    for user in range(6):
        for k in range(20):
            at, split = (
                int(rng.integers(8)),
                "train" if k < 16 else "validation" if k < 18 else "test",
            )
            rows += [
                (
                    split,
                    user,
                    k,
                    k * 86400 + user * 60 + i * 3600,
                    (at + (1 if user % 2 else -1) * i) % 8,
                )
                for i in range(4)
            ]
    rows = pd.DataFrame(rows, columns=["split", "user", "trajectory", "seconds", "poi"])
    rows["split"] = pd.Categorical(rows.split, ["train", "validation", "test"])
    rows = rows.sort_values(["split", "user", "seconds"], ignore_index=True).assign(
        split=lambda d: d.split.astype(str), cat=0, latitude=0.0
    )
    rows = rows.assign(
        user_id=rows.user,
        poi_id=rows.poi,
        longitude=rows.poi / 100,
        hour=rows.seconds // 3600 % 24,
        weekday=rows.seconds // 86400 % 7,
        local_time=pd.to_datetime(rows.seconds, unit="s"),
    )
    made = trajectories.list_instances(rows)
    made = made.assign(
        target=made.target_poi, user=made.user_id, seconds=rows.seconds.to_numpy()[made.target_row]
    )
    city, p = (
        City(rows, made, np.arange(8), np.arange(6), np.arange(1)),
        Params(
            "",
            "",
            **SMALL
            | dict(
                embedding_dim=8, num_epochs=20, eval_steps=1000, learning_rate=3e-3, dropout=0.0
            ),
        ),
    )
    model = build_sthgcn(p, 6, 8, 1)
    adam = torch.optim.Adam(model.parameters(), p.learning_rate)
    make_train_round(
        p,
        city,
        list_trajectories(city),
        encode_checkins(city),
        model.train(),
        adam,
        RateSchedule(adam, 250, 2),
    )[0](1)
    model.eval()
    test = made[made.split == "test"]
    assert [max(s, key=s.get) for s in scored(city, model, test)] == test.target_poi.tolist()


def test_a_run_that_is_stopped_goes_on(folder, tmp_path, monkeypatch):
    a = run(Params(str(folder), str(tmp_path / "a"), **SMALL))
    step = RateSchedule.step
    for at in (20, 31):

        def stopped(self):
            step(self)
            if self.now["step"] == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(RateSchedule, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(Params(str(folder), str(tmp_path / "b"), **SMALL))
    monkeypatch.setattr(RateSchedule, "step", step)
    b = run(Params(str(folder), str(tmp_path / "b"), **SMALL, num_workers=2))
    for name in (
        "predictions.parquet",
        "validation.parquet",
        "metrics.json",
        "metrics.jsonl",
        "weights.safetensors",
    ):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    table, lines = (
        pd.read_parquet(a / "predictions.parquet"),
        [json.loads(x) for x in (a / "metrics.jsonl").read_text().splitlines()],
    )
    best = max(lines, key=lambda x: x["score"])
    assert (
        list(table.columns) == ["instance_id", "target_poi", "rank", "top", "logprob", "text"]
        and table["rank"].notna().all()
    )
    assert (
        a.facts["validation Acc@1"] == round(best["Acc@1"], 4)
        and a.facts["best_step"] == best["step"]
        and a.facts["n"] == len(table)
    )
    assert len(lines) == 3 and not (a.path / "state").exists()


def test_bad_input_is_one_line(folder, tmp_path, copies):
    given = dict(trajectories=str(folder), out=str(tmp_path / "c"))
    for wrong, says in (
        (dict(trajectories=str(folder.parent / "checkins")), "poi.trajectories"),
        (dict(neighbour_sampling="best"), "random, recent, own"),
    ):
        assert says in copies.refuse("recnb.poi.sthgcn", given | wrong)
    assert not (tmp_path / "c").exists()


def test_nyc_has_as_many_questions_as_published(new_york):
    city = load_city(new_york / "trajectories")
    tr = list_trajectories(city)
    q, _ = build_prefixes(city, *find_train_prefixes(city, tr))
    assert len(q.start) == 72_206
    a = link_split(Params("", ""), city, tr, city.instances[city.instances.split == "test"])
    assert len(a.instances) == 1429 and len(a.links.to.unique()) == 1429
