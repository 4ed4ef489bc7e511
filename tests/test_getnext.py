"GETNext: nothing learnt from test, one answer whatever the hash seed or a kill, bad input."

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from pretend import Pretended
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from recnb.artifacts import load_artifact
from recnb.poi import checkins, getnext, trajectories
from recnb.poi.city import load_city
from recnb.stages import BadInput

SMALL = dict(
    gcn_dims=[8],
    poi_dim=8,
    user_dim=8,
    time_dim=4,
    category_dim=4,
    map_dim=4,
    feedforward_dim=16,
    num_epochs=3,
    learning_rate=5e-3,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folder of trajectories of a made city."
    d = tmp_path_factory.mktemp("city")
    city = dict(dataset="made", num_users=12, num_pois=40, num_days=60)
    c = checkins.run(city, out=f"{d}/checkins")
    trajectories.run(checkins=c, out=f"{d}/trajectories")
    return f"{d}/trajectories"


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    "A run in one go."
    return getnext.run(
        getnext.Params(made, str(tmp_path_factory.mktemp("run") / "getnext"), **SMALL)
    )


def untrained(made, **more):
    "City, parameters, graph and model without training."
    city = load_city(made)
    p = getnext.Params(made, "", **SMALL | more)
    graph, parts = getnext.prepare_training(p, city)
    return city, p, graph, parts["model"].eval()


def table(a, name="predictions"):
    return pd.read_parquet(a / f"{name}.parquet")


def test_what_the_stage_writes(whole, made):
    city = load_city(made)
    metrics = json.loads((whole / "metrics.json").read_text())
    test = city.instances[city.instances.split == "test"]
    p = table(whole)
    assert (
        p.instance_id.tolist() == test.instance_id.tolist()
        and p["rank"].between(1, len(city.catalogue)).all()
    )
    assert all(len(set(t)) == 20 for t in p.top)
    assert [r if r <= 20 else None for r in p["rank"]] == [
        list(t).index(x) + 1 if x in t else None for t, x in zip(p.top, p.target_poi)
    ]
    assert (
        table(whole, "own_protocol").instance_id.tolist()
        == test.instance_id[test.prefix_length >= 2].tolist()
    )
    lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda x: x["score"])
    assert (
        len(lines) == 3
        and metrics["validation"]["Acc@1"]["value"] == pytest.approx(best["Acc@1"])
        and best["epoch"] == whole.facts["best_epoch"]
    )
    assert (
        whole.facts["n"] == len(test)
        and not whole.facts["sees_target_time"]
        and not (whole.path / "state").exists()
    )
    assert load_artifact(whole.path).manifest["logs"] == ["seconds.jsonl"]


def test_a_stopped_run_goes_on(whole, made, tmp_path, monkeypatch):
    losses = getnext.compute_losses
    count = [0]

    def failing(*a):
        count[0] += 1
        if count[0] > 14:
            raise KeyboardInterrupt
        return losses(*a)

    p = getnext.Params(made, str(tmp_path / "getnext"), **SMALL, num_workers=1)
    with monkeypatch.context() as m:
        m.setattr(getnext, "compute_losses", failing)
        with pytest.raises(KeyboardInterrupt):
            getnext.run(p)
    lines = (tmp_path / "getnext.partial" / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(lines) < SMALL["num_epochs"]
    again = getnext.run(p)
    outputs = [{**a.manifest["outputs"], "seconds.jsonl": None} for a in (again, whole)]
    assert outputs[0] == outputs[1]


def test_validation_and_test_do_not_reach_the_graph(made):
    city = load_city(made)
    hidden = (city.rows.split != "train").to_numpy()
    rows = city.rows.assign(
        poi=np.where(hidden, 0, city.rows.poi),
        cat=np.where(hidden, 0, city.rows.cat),
        latitude=np.where(hidden, 0, city.rows.latitude),
    )

    def same(a, b):
        return (a.flow != b.flow).nnz == 0 and torch.equal(a.x, b.x)

    graph = getnext.build_flow_graph(city)
    assert same(graph, getnext.build_flow_graph(city._replace(rows=rows)))
    leaky = city._replace(
        rows=rows.assign(split="train"), instances=city.instances.assign(split="train")
    )
    assert not same(graph, getnext.build_flow_graph(leaky))


def test_the_target_is_not_read_when_ranking(made):
    city, p, graph, model = untrained(made)
    test = city.instances[city.instances.split == "test"]
    rows = city.rows.copy()
    rows.loc[test.target_row, ["poi", "clock"]] = [0, 0.0]
    with torch.inference_mode():
        a, b = (
            getnext.rank_with_getnext(p, model, graph, city, test),
            getnext.rank_with_getnext(p, model, graph, city._replace(rows=rows), test),
        )
        rows.loc[np.concatenate(list(test.prefix)), "clock"] = 0.0
        c = getnext.rank_with_getnext(p, model, graph, city._replace(rows=rows), test)
    assert a.logprob.tolist() == b.logprob.tolist() != c.logprob.tolist()


@pytest.mark.parametrize("released", [False, True])
def test_a_ranking_has_no_neighbours(made, released):
    "It has as released: there the batch decides, and this test shows that it would be seen."
    city, p, graph, model = untrained(made, released_axis=released)
    test = city.instances[city.instances.split == "test"]
    other = test.iloc[np.random.default_rng(0).permutation(len(test))]

    def values(d):
        return np.array(d.set_index("instance_id").logprob.loc[test.instance_id].tolist())

    with torch.inference_mode():
        a, b, c = (
            values(getnext.rank_with_getnext(p, model, graph, city, test)),
            values(getnext.rank_with_getnext(p, model, graph, city, other)),
            values(
                getnext.rank_with_getnext(p, model, graph, city, test[:1])
                .iloc[[0] * len(test)]
                .assign(instance_id=test.instance_id.tolist())
            ),
        )
    assert np.allclose(a, b, atol=1e-4) != released
    if not released:
        assert np.allclose(a[0], c[0], atol=1e-4)


@pytest.mark.parametrize("released", [False, True])
def test_later_check_ins_change_no_earlier_step(made, released):
    "Attention along time is causal; as released it hides later trajectories, not later check-ins."
    city, p, graph, model = untrained(made, released_axis=released)
    long = city.instances[(city.instances.split == "train") & (city.instances.prefix_length >= 3)][
        :6
    ]
    walks = getnext.stack_trajectories(city, long, True)
    changed = walks.poi.clone()
    changed[walks.start + 2] = (changed[walks.start + 2] + 1) % len(city.catalogue)
    with torch.inference_mode():
        a, b = (
            getnext.compute_step_states(
                p, model, graph, getnext.take_inputs(walks._replace(poi=x), torch.arange(6))
            )
            for x in (walks.poi, changed)
        )
    assert torch.allclose(a[:, :2], b[:, :2], atol=1e-5) and not torch.allclose(
        a[:, 2], b[:, 2], atol=1e-3
    )
    assert torch.allclose(a[:, 3:], b[:, 3:], atol=1e-5) == released


@pytest.mark.parametrize("without", [False, True])
def test_parts_of_the_loss_have_the_gradient_of_the_whole(made, without):
    city, p, graph, model = untrained(made)
    walks = getnext.stack_trajectories(city, city.instances[city.instances.split == "train"], True)
    found = []
    for size in (10**6, 4):
        steps = getnext.take_steps(graph.flow, walks, torch.arange(9), size)
        h = getnext.compute_step_states(p, model, graph, steps.inputs).flatten(0, 1)[steps.place]
        model.zero_grad()
        getnext.compute_poi_loss(model, graph, h.detach(), steps, without).backward()
        found.append({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
    assert (
        found[0].keys() == found[1].keys() == {"map.w", "map.a", "next_poi.weight", "next_poi.bias"}
    )
    assert all(torch.allclose(found[0][n], found[1][n], rtol=1e-3, atol=1e-4) for n in found[0])


@pytest.mark.parametrize("released", [False, True])
def test_a_step_is_computed_on_a_device_and_never_waits_for_it(made, released, monkeypatch):
    "The weights, the graph and the batch are all that is moved there; several parts of the loss."
    city, p, graph, model = untrained(made, leave_own_out=True, released_axis=released)
    walks = getnext.stack_trajectories(city, city.instances[city.instances.split == "train"], True)
    steps = getnext.take_steps(graph.flow, walks, torch.arange(20), 16)
    assert len(steps.flows) > 1
    monkeypatch.setattr(torch.sparse, "mm", torch.mm)  # that pretends to nothing sparse
    dense = graph._replace(edges=graph.edges.to_dense())
    with Pretended() as on:
        there, batch = on.put((dense, steps))
        on.put_model(model.train())
        sum(getnext.compute_losses(p, model, there, batch)).backward()
        assert all(w.grad.device.type == on.device for w in model.parameters())
        with pytest.raises(FakeTensorDeviceMismatchError):
            left = batch._replace(tau=on.from_tensor(steps.tau))
            getnext.compute_losses(p, model, there, left)


def test_own_transitions_are_left_out_in_training_alone(made):
    city, p, graph, model = untrained(made, leave_own_out=True, dropout=0.0)
    walks, other = (
        getnext.stack_trajectories(city, city.instances[city.instances.split == "train"], True),
        getnext.Params(made, "", **SMALL, dropout=0.0),
    )

    steps = getnext.take_steps(graph.flow, walks, torch.arange(40))

    def loss(q):
        return getnext.compute_losses(q, model, graph, steps)[0].item()

    assert loss(p) == loss(other)
    model.train()
    assert np.isfinite(loss(p)) and loss(p) != loss(other)


def test_bad_input_is_one_line(made, tmp_path, copies):
    with pytest.raises(BadInput, match="divisor"):
        getnext.run(getnext.Params(made, str(tmp_path / "x"), num_heads=7))
    with pytest.raises(BadInput, match="num_epochs"):
        getnext.run(dict(num_epochs=0), trajectories=made, out=str(tmp_path / "x"))
    other = dict(trajectories=os.path.dirname(made) + "/checkins", out=str(tmp_path / "y"))
    assert "poi.trajectories" in copies.refuse("recnb.poi.getnext", other)
