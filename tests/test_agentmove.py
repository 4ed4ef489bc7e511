"AgentMove: past moves of others as a loop counts them; its prompt; the same after a stop."

from collections import Counter

import pandas as pd
import pytest

from recnb.poi import agentmove, checkins, in_context, trajectories
from recnb.poi.city import load_city


@pytest.fixture(scope="module")
def T(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    C = checkins.run(
        dataset="made", num_users=25, num_pois=40, num_days=60, seed=2, out=str(d / "c")
    )
    return trajectories.run(checkins=C.path, out=str(d / "t"))


@pytest.mark.parametrize("until", ["train", "now"])
def test_neighbours_as_a_loop_counts_them(T, until):
    city = load_city(T.path)
    graph = agentmove.build_move_graph(city, until)
    found = 0
    for i in city.instances[city.instances.split == "test"].itertuples():
        here = city.rows.iloc[i.prefix[-1]]
        counts = Counter()
        for (split, *_), g in city.rows.groupby(["split", "user_id", "trajectory"]):
            if until == "train" and split != "train":
                continue
            g = g.sort_values("seconds", kind="stable")
            for a, b, t in zip(g.poi_id[:-1], g.poi_id[1:], g.seconds[1:]):
                if t < here.seconds and a != b and here.poi_id in (a, b):
                    counts[b if a == here.poi_id else a] += 1
        wanted = [p for p, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))][:10]
        assert agentmove.find_successors(graph, here.poi_id, here.seconds) == wanted
        found += len(wanted)
    assert found > 0


def test_planted_later_moves_change_nothing(T):
    "A thousand moves from the current place to the target, a second after the question."
    city = load_city(T.path)
    i = city.instances[city.instances.split == "test"].iloc[0]
    here = city.rows.iloc[i.prefix[-1]]
    base = here.to_dict() | dict(user_id=999, split="train")
    planted = pd.DataFrame(
        [
            base | dict(trajectory=f"x{k}", poi_id=p, seconds=here.seconds + t)
            for k in range(1000)
            for p, t in ((here.poi_id, 0), (i.target_poi, 1))
        ]
    )
    later = city._replace(rows=pd.concat([city.rows, planted], ignore_index=True))
    p = agentmove.Params(trajectories="", out="", world=False)

    def text(c):
        return agentmove.write_agentmove_prompt(c, i, p, agentmove.gather_knowledge(c, p, None), {})

    assert text(later) == text(city)
    assert (
        agentmove.find_successors(agentmove.build_move_graph(later), here.poi_id, here.seconds + 2)[
            0
        ]
        == i.target_poi
    )  # without the check of time the answer would be there


def test_parts_of_the_prompt(T):
    city = load_city(T.path)
    i = city.instances[city.instances.split == "test"].iloc[0]
    p = agentmove.Params(trajectories="", out="")
    known = agentmove.gather_knowledge(city, p, None)
    whole = agentmove.write_agentmove_prompt(
        city, i, p, known, dict(districts="x" * 1500 + "north", places="a bar")
    )
    order = [
        whole.index(x)
        for x in (
            "<memory>",
            "<world>",
            "<others>",
            "<historical_stays>",
            "<context_stays>",
            "Where is the person",
            "JSON",
        )
    ]
    assert (
        order == sorted(order)
        and "north" in whole
        and "x" * 1001 not in whole
        and f"{i.target_time:%A}" in whole.splitlines()[-2]
    )
    for part, mark in (("memory", "<memory>"), ("world", "<world>"), ("collective", "<others>")):
        assert mark not in agentmove.write_agentmove_prompt(
            city,
            i,
            agentmove.Params(trajectories="", out="", **{part: False}),
            known,
            {},
        )


def test_goes_on_after_a_stop(T, tmp_path, monkeypatch):
    values = dict(
        trajectories=T.path,
        provider="local",
        mode="exact",
        model_checkpoint="tiny-llama",
        test_rows=3,
        max_new_tokens=6,
    )
    whole = pd.read_parquet(agentmove.run(values, out=str(tmp_path / "a")) / "predictions.parquet")
    monkeypatch.setattr(
        in_context, "rank_exactly", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        agentmove.run(values, out=str(tmp_path / "b"))
    monkeypatch.undo()
    again = agentmove.run(values, out=str(tmp_path / "b"))
    lines = (again / "answers.jsonl").read_text().count('"text"')
    assert (
        whole.equals(pd.read_parquet(again / "predictions.parquet"))
        and again.facts["setting"] == {"geocoder": "geohash cells and categories"}
        and lines > 0
    )
