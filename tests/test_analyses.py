"Groups and paired tests; the published tables, recomputed from the published predictions."

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recnb.artifacts import stage, write_parquet
from recnb.poi import analyses
from recnb.poi.analyses import (
    Params,
    bound_activity_sizes,
    cell_of,
    convert_stored,
    find_implied_hits,
    group_by_activity,
    group_by_length,
    group_by_length_thirds,
    group_by_slice,
    group_instances,
    make_folder_lines,
    make_lines,
    run,
)
from recnb.poi.trajectories import INSTANCES, ROWS, load_trajectories
from recnb.results import read_lines
from recnb.stages import BadInput
from recnb.tables import judge_share, write_settings

ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
PUBLISHED = ROOT / "papermill_runs/published"


def town(users=30, seed=0):
    "Random trajectories: rows, and instances whose prefixes point into them."
    rng = np.random.default_rng(seed)
    rows = []
    instances = []
    for split, most in (("train", 9), ("test", 4)):
        for u in rng.permutation(users + 2 * (split == "test")):
            for _ in range(rng.integers(1, most)):
                pois = rng.integers(0, 12, rng.integers(2, 9)).tolist()
                at = list(range(len(rows), len(rows) + len(pois)))
                rows += [(int(u), p, split) for p in pois]
                instances.append((split, int(u), at[:-1], pois[-1]))
    instances = (
        pd.DataFrame(instances, columns=["split", "user_id", "prefix", "target_poi"])
        .rename_axis("instance_id")
        .reset_index()
    )
    return instances.assign(prefix_length=instances.prefix.str.len()), pd.DataFrame(
        rows, columns=["user_id", "poi_id", "split"]
    )


@dataclasses.dataclass
class Made:
    out: str
    seed: int = 0
    better: float = 0.0


@stage("poi.trajectories", Made)
def trajectories(p, folder):
    for table, toy in zip((INSTANCES, ROWS), town(seed=p.seed)):
        table.write(toy.assign(**dict.fromkeys(set(table.columns) - set(toy))), folder)


@stage("poi.evaluate", Made)
def evaluate(p, folder):
    t = town()[0].query('split == "test"')
    rank = np.random.default_rng(p.seed).integers(1, 30, len(t))
    rank[np.random.default_rng(99).random(len(t)) < p.better] = 1
    write_parquet(
        pd.DataFrame(
            dict(
                instance_id=t.instance_id,
                target_poi=t.target_poi,
                rank=pd.array(rank, dtype="Int64"),
                top=[[1, 2]] * len(t),
            )
        ),
        folder / "predictions.parquet",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    d = tmp_path_factory.mktemp("run")
    trajectories(Made(str(d / "trajectories")))
    for i, name in enumerate(("full", "text", "none")):
        evaluate(Made(str(d / name), i, 0.3 * (name == "full")))
    return d


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "recnb.poi.analyses", *map(str, args)],
        env=ENV,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("seed", range(5))
def test_groups_cover_every_instance_and_repeat_under_shuffling(seed):
    instances, rows = town(seed=seed)
    member = group_instances(instances, rows)
    tests = instances[instances.split == "test"]
    assert member.index.tolist() == tests.instance_id.tolist() and member.notna().all(axis=None)
    shuffled = group_instances(instances.sample(frac=1, random_state=1), rows).sort_index()
    pd.testing.assert_frame_equal(shuffled, member)
    bounds = bound_activity_sizes(instances)
    sizes = group_by_activity(instances).value_counts()
    assert all(bounds[g]["fewest"] <= sizes.get(g, 0) <= bounds[g]["most"] for g in bounds)


@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_a_plain_loop(seed):
    instances, rows = town(seed=seed)
    tests = instances[instances.split == "test"]
    counts = {}
    for u in instances.user_id[instances.split == "train"]:
        counts[u] = counts.get(u, 0) + 1
    ranked = sorted(counts, key=lambda u: (-counts[u], u))
    third = len(ranked) // 3

    def activity(u):
        return (
            "inactive"
            if u not in counts or u in ranked[-third:]
            else "very active"
            if u in ranked[:third]
            else "normal"
        )

    assert group_by_activity(instances).tolist() == [activity(u) for u in tests.user_id]
    order = sorted(tests.prefix_length)
    third = len(order) // 3

    def length(n):
        return "short" if n in order[:third] else "long" if n in order[-third:] else "middle"

    assert group_by_length(instances).tolist() == [length(n) for n in tests.prefix_length]
    assert group_by_length_thirds(instances).value_counts()[["short", "long"]].tolist() == [
        third,
        third,
    ]

    def seen(i):
        return (
            "in prefix"
            if i.target_poi in set(rows.poi_id[i.prefix])
            else "in history"
            if (
                (rows.user_id == i.user_id)
                & (rows.poi_id == i.target_poi)
                & (rows.split == "train")
            ).any()
            else "never seen"
        )

    assert group_by_slice(instances, rows).tolist() == [seen(i) for i in tests.itertuples()]


def test_group_values_average_to_the_whole(folders):
    lines = pd.DataFrame(
        make_folder_lines(
            folders / "full", folders / "trajectories", dataset="made", model="", method="m"
        )
    )
    lines["family"] = lines.slice.map(lambda slice: next(iter(slice), ""))
    whole = lines[(lines.family == "") & (lines.metric == "MRR")].iloc[0]
    for family in ("slice", "activity", "length", "length_thirds"):
        part = lines[(lines.family == family) & (lines.metric == "MRR")]
        assert part.n.sum() == whole.n and (
            part.value.astype(float) * part.n
        ).sum() / whole.n == pytest.approx(whole.value)


def test_predictions_of_some_instances_keep_their_groups(folders):
    instances, rows = town()
    p = pd.read_parquet(folders / "full/predictions.parquet")
    some = make_lines(p[:20], instances, rows, dataset="made", model="", method="m", where="x")
    assert sum(x["n"] for x in some if "slice" in x["slice"] and x["metric"] == "Acc@1") == 20


def test_predictions_of_another_run_are_refused(folders, tmp_path):
    other = trajectories(Made(str(tmp_path / "other"), seed=5))
    with pytest.raises(BadInput, match="other instances"):
        make_folder_lines(folders / "full", other.path, dataset="made", method="m")


def test_a_line_is_named_by_its_run_unless_told_otherwise(folders):
    lines = make_folder_lines(folders / "full", folders / "trajectories", dataset="d", method="m")
    assert {x["where"] for x in lines} == {str(folders / "full/manifest.json")}
    abroad = dict(settings=dict(trained_on="elsewhere"), families=["slice"], seed=3)
    lines = make_folder_lines(
        folders / "full", folders / "trajectories", dataset="d", method="m", **abroad
    )
    assert {x["settings"]["trained_on"] for x in lines} == {"elsewhere"}
    assert {x["seed"] for x in lines} == {3} and {*map(str, (x["slice"] for x in lines))} == {
        "{}",
        *(str(dict(slice=g)) for g in ("in prefix", "in history", "never seen")),
    }


def test_profiles_that_differ_are_told_apart(folders):
    ranked = {
        ("made", "m", "GenUP", ("profile", part)): analyses.read_predictions(folders / part)
        for part in ("full", "text", "none")
    }
    tests = analyses.compare_pairs(ranked)
    full = [t for t in tests if t["settings"] == dict(profile="full")]
    assert len(tests) == 3 and len(full) == 2
    assert all(t["p"] <= t["p_holm"] < 0.05 and t["only_a"] > t["only_b"] for t in full)


@pytest.mark.parametrize(
    "args, told",
    [
        ([], "stored"),
        (["--stored", "none.parquet"], "published"),
        (["--stored", "none.parquet", "--published", "papermill_runs/published"], "none.parquet"),
        (["--stored", "x", "--published", "x", "--trajectories", "nowhere"], "nowhere"),
        (["--stored", "x", "--published", "x", "--trajectory", "x"], "trajectories"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, args, told):
    r = command(*args, "--out", tmp_path / "x")
    assert (
        r.returncode == 2
        and told in r.stderr
        and "Traceback" not in r.stderr
        and r.stderr.count("\n") == 1
    )


def test_stored_answers_are_compared_as_text():
    t = pd.DataFrame(
        dict(i=[0, 1, 2, 3, 4], pred=["12", "012", "", None, "1 2"], target=["12"] * 5)
    )
    p = convert_stored(t)
    assert p["rank"].notna().tolist() == [True, False, False, False, False] and p.top.map(
        len
    ).tolist() == [1, 1, 0, 0, 0]


def test_a_printed_share_is_equal_cut_or_different():
    assert [judge_share(x, 1485, 6980, 4) for x in (0.2128, 0.2127, 0.2582)] == [
        "equal",
        "cut",
        "different",
    ]
    assert all(
        h in find_implied_hits(h * 10_000 // n / 10_000, n)
        for n in (257, 1429, 7994)
        for h in range(0, n, 7)
    )


# ------------------------------------------------------------ real data


@pytest.fixture(scope="module")
def stored():
    from conftest import DATA

    file = DATA / "genup/results_predictions.parquet"
    if not file.exists():
        pytest.skip(f"needs the published predictions at {file} (set RECNB_DATA)")
    return file


@pytest.fixture(scope="module")
def report(stored, tmp_path_factory):
    a = run(
        Params(
            out=str(tmp_path_factory.mktemp("p") / "published"),
            stored=str(stored),
            published=str(PUBLISHED),
        )
    )
    return json.loads((a / "published.json").read_text())


def test_every_printed_cell_is_traced(report):
    assert report["files"] == 39
    assert report["verdicts"] == {
        "adds up": 90,
        "cut": 15,
        "equal": 31,
        "not stored": 3,
        "swapped": 2,
    }
    assert {
        (c["method"], c["dataset"]) for c in report["cells"] if c["verdict"] == "not stored"
    } == {("LLM4POI*", d) for d in ("nyc", "tky", "ca")}


def test_the_swapped_cells_are_found(report):
    swapped = sorted(
        (c["dataset"], c["cell"], c["printed"], c["hits"])
        for c in report["cells"]
        if c["verdict"] == "swapped"
    )
    assert swapped == [
        ("nyc", "trained_on=nyc", 0.2127, 369),
        ("tky", "trained_on=tky", 0.2582, 1485),
    ]


def test_hits_of_the_main_table(report):
    hits = {
        (c["dataset"], c["model"]): c["hits"]
        for c in report["cells"]
        if not c["cell"] and c["method"] == "GenUP"
    }
    small = "Llama-3.2-1B"
    seven = "Llama-2-7b-longlora-32k-merged"
    eight = "Meta-Llama-3.1-8B"
    assert [hits[d, seven] for d in ("nyc", "tky", "ca", "moscow", "sao_paulo")] == [
        368,
        1186,
        303,
        2107,
        1407,
    ]
    assert [hits[d, eight] for d in ("nyc", "tky", "ca", "moscow", "sao_paulo")] == [
        369,
        1485,
        371,
        2166,
        1430,
    ]
    assert [hits[d, small] for d in ("nyc", "tky", "ca", "moscow", "sao_paulo")] == [
        355,
        1292,
        351,
        2133,
        1402,
    ]


def test_what_the_published_rows_establish(report):
    seven, p = (
        "Llama-2-7b-longlora-32k-merged",
        {
            (t["dataset"], t["method"], t["model"], write_settings(t["settings"]), t["against"]): t
            for t in report["tests"]
        },
    )
    ablation = [t for k, t in p.items() if "profile=" in k[3]]
    assert len(ablation) == 6 and all(t["p"] == 1 for t in ablation)
    llm4poi = p["moscow", "GenUP", seven, "", f"LLM4POI* {seven}"]
    assert (llm4poi["only_a"], llm4poi["only_b"]) == (366, 194) and llm4poi["p_holm"] < 1e-10
    assert p["nyc", "GenUP", seven, "", "GenUP Meta-Llama-3.1-8B"]["p"] == 1


def test_a_changed_prediction_is_noticed(stored, tmp_path):
    t = pd.read_parquet(stored)
    t = t[t.file.str.contains("NYC-POI-FourSquare-NYC-POI")]
    at = t.index[
        (t.file == "Llama-3.2-1B-FourSquare-NYC-POI-FourSquare-NYC-POI") & (t.pred == t.target)
    ][:3]
    t.loc[at, "pred"] = "0"
    write_parquet(t, tmp_path / "p.parquet")
    a = run(
        Params(
            out=str(tmp_path / "out"),
            stored=str(tmp_path / "p.parquet"),
            published=str(PUBLISHED),
        )
    )
    cells = {
        (c["dataset"], c["model"], c["cell"]): c["verdict"]
        for c in json.loads((a / "published.json").read_text())["cells"]
    }
    assert (
        cells["nyc", "Llama-3.2-1B", ""] == "different"
        and cells["nyc", "Llama-3.2-1B", "length=short"] == "does not add up"
    )
    assert cells["nyc", "Llama-2-7b-longlora-32k-merged", ""] == "equal"


@pytest.fixture(scope="module")
def nyc(new_york):
    return new_york / "trajectories"


def test_the_groups_of_new_york(nyc):
    rows, instances = load_trajectories(nyc)
    assert group_by_length(instances).value_counts().to_dict() == dict(
        short=601, middle=257, long=571
    )
    assert group_by_slice(instances, rows).value_counts().to_dict() == {
        "in prefix": 531,
        "in history": 553,
        "never seen": 345,
    }
    bounds = bound_activity_sizes(instances)
    assert all(
        bounds[g]["fewest"] <= n <= bounds[g]["most"]
        for g, n in (("inactive", 323), ("normal", 274), ("very active", 832))
    )
    assert (bounds["inactive"]["tied_users"], bounds["very active"]["tied_users"]) == (71, 32)
    assert group_by_activity(instances).value_counts().to_dict() == {
        "inactive": 322,
        "normal": 279,
        "very active": 828,
    }


def test_the_published_length_table_of_new_york_comes_back(nyc, stored, tmp_path):
    a = run(
        Params(
            out=str(tmp_path / "published"),
            stored=str(stored),
            published=str(PUBLISHED),
            trajectories=str(nyc),
        )
    )
    report = json.loads((a / "published.json").read_text())
    assert report["verdicts"] == {
        "adds up": 81,
        "cut": 18,
        "equal": 37,
        "not stored": 3,
        "swapped": 2,
    }
    cells = [
        c for c in report["cells"] if c["dataset"] == "nyc" and c["cell"].startswith("length=")
    ]
    assert len(cells) == 9 and {c["verdict"] for c in cells} == {"equal", "cut"}
    lines = {(x.model, cell_of(x)): x for x in read_lines(a / "lines.jsonl") if x.dataset == "nyc"}
    assert lines["Llama-2-7b-longlora-32k-merged", "length=short"].value == 119 / 601
    copying = [
        lines[m, f"trained_on=nyc, slice={s}"].value
        for m in ("Llama-2-7b-longlora-32k-merged", "Llama-3.2-1B")
        for s in ("in prefix", "never seen")
    ]
    assert copying[0] > 0.6 < copying[2] and copying[1] < 0.01 > copying[3]
