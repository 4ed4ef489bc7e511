"""A stage is built twice, the second time on data that differ from some moment on: what may not
have seen the difference must be the same to the byte.

All users of the made data act at the same moments. So one change touches the own label of every
row of its moment, and what is later for every row before it; one that begins with test touches
everything of test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from recnb.poi import checkins, profiles, trajectories
from recnb.poi import prompts as poi_prompts
from recnb.rating import prompts as rating_prompts
from recnb.rating import reviews, sketch

LABELS = {"rating", "label", "target_poi", "completion", "rank", "correct"}
NAMES = {"trajectory", "trajectory_id", "sources", "source_file"}  # numbered across splits; paths
ABOUT_TEST = {
    *("metrics.json", "statistics.json", "tokens.json", "history.json", "usage.json"),
    *("ceilings.json", "dropped.parquet"),
}
TIMINGS = ("second", "per_s", "memory")


class Change(NamedTuple):
    "What the second data have otherwise."

    moment: int  # from which they differ
    own: bool  # at the moment itself its labels alone: what precedes a label must stay the same


def read_file(file: Path):
    "A table, records without timings, or bytes."
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix == ".jsonl":
        lines = map(json.loads, file.read_text().splitlines())
        return [{k: v for k, v in r.items() if not any(t in k for t in TIMINGS)} for r in lines]
    return file.read_bytes()


def read_outputs(built) -> dict:  # name → table, records or bytes
    "What a stage wrote."
    if isinstance(built, dict):
        return built
    files = [f for f in Path(built.path).rglob("[!.]*") if f.is_file()]
    without = ABOUT_TEST | {"manifest.json", "seconds.jsonl"}
    return {f.name: read_file(f) for f in files if f.name not in without}


class World:
    "Data of a task, and the first stages made of them."

    changes: dict[str, Change]
    test: int  # first moment of test

    def __init__(self, folder: Path, change: Change | None = None):
        self.folder = folder
        self.change = change
        folder.mkdir(parents=True)
        self.data = folder / "data.csv"
        self.data.write_text("\n".join(self.make_lines()) + "\n")
        self.built = self.build()
        self.moments = self.find_moments()

    def has_changed(self, moment: int) -> tuple[bool, bool]:  # at all, in more than its label
        "What becomes of a moment in this world."
        if self.change is None or moment < self.change.moment:
            return False, False
        return True, moment > self.change.moment or not self.change.own

    def list_known(self, name: str, table: pd.DataFrame, change: Change) -> dict:
        "The exact values of each column that must be the same after a change."
        key = next((k for k in self.moments if k in table), None)
        at = table[key].map(self.moments[key]) if key else pd.Series(-1, table.index)
        if at.isna().any():
            raise ValueError(f"{name}: rows of no moment: {table[key][at.isna()].tolist()[:5]}")
        split = table.get("split", pd.Series(name.removesuffix(".parquet"), table.index))
        # what train and validation are made of knows nothing of test, whatever its moment
        fitted = split.isin(["history", "train", "validation"]) & (change.moment >= self.test)
        out = {}
        for c in table.columns.difference(NAMES):
            own = change.own and c not in LABELS and key != "local_time"
            known = table[c][fitted | (at < change.moment + own)]
            out[c] = [repr(x.tolist() if hasattr(x, "tolist") else x) for x in known]
        return out


def find_differences(
    build,  # function of a world and a folder: what a stage wrote
    before: World,
    after: World,  # the changed one
    folder: Path,  # to write into
    known: dict | None = None,  # what `build` gives for `before`, if it was built already
) -> list[str]:  # file, or file and column
    "What differs though it may not."
    a = read_outputs(build(before, f"{folder}/before")) if known is None else known
    b = read_outputs(build(after, f"{folder}/after"))
    out = [f"{name} is there once" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        x, y = a[name], b[name]
        if isinstance(x, pd.DataFrame):
            x, y = (w.list_known(name, t, after.change) for w, t in ((before, x), (after, y)))
            out += [f"{name}: {c}" for c in sorted(x.keys() | y.keys()) if x.get(c) != y.get(c)]
        elif x != y:
            out.append(name)
    return out


class Reviews(World):
    "Users who rate an item a round: three rounds of history, four of train, validation, test."

    users, items, rounds, test = 24, 30, 9, 8
    changes = {f"round_{k}": Change(k, True) for k in range(3, 9)} | {"test": Change(8, False)}

    def make_lines(self):
        rng = np.random.default_rng(5)
        genres = "Drama Comedy Horror Action Romance".split()
        first, second = "mist wolf lake moon road".split(), "man land fire song day town".split()
        words = rng.permutation([f"{a}{b}".title() for a in first for b in second])
        yield "user_id,item_id,rating,timestamp,title,categories"
        for u in range(self.users):
            # the catalogue is given: the first rounds show every item, whatever changes later
            shown = [(3 * u + k) % self.items for k in range(3)]
            mine = [*shown, *(i for i in rng.permutation(self.items) if i not in shown)]
            for k, y in enumerate(rng.integers(1, 6, self.rounds)):
                changed, wholly = self.has_changed(k)
                i = mine[k + self.rounds * wholly]
                y = (5, 4, 5, 2, 1)[y - 1] if changed else y  # a 3 changes too
                t = 1_500_000_000_000 + 86_400_000 * k + 3_600_000 * wholly
                genre = genres[i % len(genres)]
                yield f"u{u:02d},i{i:02d},{y},{t},{words[i]} {genre},Films|{genre}"

    @property
    def reading(self):
        return dict(dataset="table", data=str(self.data), columns=["categories=categories"])

    def build(self):
        d = self.folder
        R = reviews.run(**self.reading, out=f"{d}/reviews")
        S = sketch.run(reviews=R, n_clusters=5, top_k=6, out=f"{d}/sketch")
        P = rating_prompts.run(reviews=R, sketch=S, max_history=4, out=f"{d}/prompts")
        return dict(reviews=R, sketch=S, prompts=P)

    def find_moments(self):
        df = reviews.INTERACTIONS.read(self.built["reviews"])
        return dict(row_id=dict(zip(df.row_id, df.position)))


class City(World):
    "Users who check in thrice a session: 16 sessions of train, two of validation, two of test."

    users, pois, sessions, test = 10, 30, 20, 3 * 18
    begin = pd.Timestamp("2012-04-03")
    changes = dict(
        early=Change(3 * 9 + 2, True),
        train=Change(3 * 15 + 2, True),
        validation=Change(3 * 17 + 2, True),
        own=Change(3 * 19 + 2, True),
        test=Change(test, False),
    )

    def make_lines(self):
        rng = np.random.default_rng(6)
        kinds = "Bar Office Park Gym Cafe".split()
        visits = rng.integers(0, self.pois, (3 * self.sessions, self.users))
        visits.flat[: self.pois] = range(self.pois)  # train knows every POI
        yield "user,poi,time,category,latitude,longitude"
        for moment in range(3 * self.sessions):
            changed, wholly = self.has_changed(moment)
            t = self.begin + pd.Timedelta(days=moment, minutes=11 * wholly)
            # the three of a session on one day, each session three days after the one before
            t += pd.Timedelta(hours=8 + moment // 3 % 3) - pd.Timedelta(hours=19) * (moment % 3)
            for u in range(self.users):
                p = (visits[moment, u] + 3 * changed) % self.pois
                user, poi = f"u{u:02d}", f"p{p:02d}"
                if wholly and not self.change.own:
                    # somebody and some place that train has never seen, first in any order
                    user = "a" if u == 0 and moment >= 3 * self.sessions - 3 else user
                    poi = "a" if u == 1 and moment == 3 * self.sessions - 3 else poi
                place = f"{40.7 + 0.002 * (p % 6):.3f},{-74 + 0.002 * (p // 6):.3f}"
                yield f"{user},{poi},{t:%Y-%m-%d %H:%M:%S},{kinds[p % 5]},{place}"

    @property
    def reading(self):
        names = "user poi time category latitude longitude".split()
        filters = dict(min_poi_freq=0, min_user_freq=0, isolation_minutes=1e9)
        columns = [f"{n}={n}" for n in names]
        return dict(dataset="table", data=str(self.data), columns=columns, **filters)

    def build(self):
        d = self.folder
        C = checkins.run(**self.reading, out=f"{d}/checkins")
        T = trajectories.run(checkins=C, out=f"{d}/trajectories")
        F = profiles.run(checkins=C, trajectories=T, out=f"{d}/profiles")
        P = poi_prompts.run(trajectories=T, profiles=F, out=f"{d}/prompts")
        return dict(checkins=C, trajectories=T, profiles=F, prompts=P)

    def find_moments(self):
        def number(times):
            since = times - self.begin
            return (since.dt.days // 3) * 3 + (since.dt.seconds // 3600 - 8) // 5

        x = trajectories.INSTANCES.read(self.built["trajectories"])
        times = checkins.CHECKINS.read(self.built["checkins"]).local_time
        return dict(
            instance_id=dict(zip(x.instance_id, number(x.target_time))),
            local_time=dict(zip(times, number(times))),
        )
