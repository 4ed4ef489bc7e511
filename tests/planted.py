"""Leaks, each put in the place of one function of a stage: it is given that function and its
arguments, and lets it see what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd

from recnb.artifacts import load_artifact
from recnb.poi import (
    agentmove,
    blend,
    checkins,
    counters,
    evaluate,
    getnext,
    in_context,
    llm4poi,
    profiles,
    ranker,
    reranker,
    sft,
    sthgcn,
    trajectories,
)
from recnb.poi import prompts as poi_prompts
from recnb.rating import (
    alignment,
    answer_only,
    baselines,
    grpo,
    reasoning,
    reviews,
    sketch,
    warm_start,
)
from recnb.rating import prompts as rating_prompts


def see_own_label(real, df, rows, *more):
    own = [[*h, i] for h, i in zip(rows.history, rows.row_id)]
    return real(df, rows.assign(history=own), *more)


def see_all_ratings_of_the_user(real, df, rows, *more):
    own = df.groupby("user_id").row_id.apply(list)
    return real(df, rows.assign(history=own.reindex(rows.user_id).to_numpy()), *more)


def put_the_row_into_its_history(real, *given):
    rows = real(*given)
    return rows.assign(history=[[*h, i] for h, i in zip(rows.history, rows.row_id)])


def put_the_next_row_into_a_history(real, *given):
    rows = real(*given)
    following = (rows.row_id + 1) % (rows.row_id.max() + 1)
    return rows.assign(history=[[*h, i] for h, i in zip(rows.history, following)])


def split_users_without_time(real, df, *more):
    out = real(df, *more)
    drawn = out.groupby("user_id")["split"].sample(frac=1, random_state=0)
    return out.assign(split=drawn.to_numpy())


def show_the_released_sketch(real, df, rows, *more):
    known = df[df["split"].isin(["history", "train"])].groupby("user_id").row_id.apply(list)
    shipped = real(df, rows.assign(history=known.reindex(rows.user_id).to_numpy()), *more)
    return real(df, rows, *more).assign(count=shipped["count"].to_numpy())


def cluster_items_by_ratings(real, df, *more):
    items = real(df, *more)
    liked = df.groupby("item_id").rating.mean().reindex(items.item_id).to_numpy() > 3
    return items.assign(text=items.text + np.where(liked, " beloved", " despised"))


def rate_the_candidate(real, df, *more):
    return real(df.assign(title=df.title + " " + df.rating.astype(str)), *more)


def show_the_next_sketch(real, df, rows, sketches, *more):
    return real(df, rows, sketches.shift(-1).fillna(""), *more)


def end_rationales_in_the_label(real, p, tokenizer):
    texts, said = real(p, tokenizer)
    labels = rating_prompts.open_prompts(p.prompts)[1]["train"].label
    labels = labels.iloc[warm_start.sample_rows(len(labels), p.train_rows, p.seed)]
    written = [s.rpartition("<answer>")[0] for s in said]
    return texts, [f"{s}<answer>{y:g}</answer>" for s, y in zip(written, labels)]


def train_on_test(real, *given):
    system, tables = real(*given)
    return system, tables | dict(train=tables["test"])


def judge_by_test(real, *given):
    system, tables = real(*given)
    return system, tables | dict(validation=tables["test"])


def hint_at_the_label(real, *given):
    system, table, tables = real(*given)
    hint = table.label.map("\nIt is known to be {:g}.".format)
    return system, table.assign(prompt=table.prompt + hint), tables


def fit_factors_on_test(real, df, *more):
    return real(df.assign(split=df["split"].replace("test", "train")), *more)


def choose_an_offset_on_test(real, df, _, test, *more):
    return real(df, label_rows(df, test), test, *more)


def choose_shrinkage_on_test(real, df, train, _, test):
    return real(df, train, label_rows(df, test), test)


def stop_trees_on_test(real, df, train, _, test, *more):
    return real(df, train, label_rows(df, test), test, *more)


def label_rows(df, rows):
    return rows.assign(label=df.rating.to_numpy()[rows.row_id])


def average_all_ratings_of_an_item(real, df, rows):
    mean = df.groupby("item_id").rating.mean().reindex(df.item_id[rows.row_id])
    return real(df, rows).assign(item_mean=mean.to_numpy())


def number_all_checkins(real, ids, train, *more):
    return real(ids, np.ones(len(ids), bool), *more)


def split_checkins_without_time(real, time):
    return pd.Series(real(time)).sample(frac=1, random_state=0).to_numpy()


def add_to_prefixes(instances, step=0):
    rows = zip(instances.prefix, instances.target_row + step)
    return instances.assign(
        prefix=[np.append(x, t) for x, t in rows], prefix_length=instances.prefix_length + 1
    )


def put_the_target_into_its_prefix(real, *given):
    return add_to_prefixes(real(*given))


def put_what_follows_into_a_prefix(real, *given):
    return add_to_prefixes(real(*given), 1)


def describe_users_by_test(real, folder, *more):
    return read_as_train(folder, "test")


def describe_users_by_validation(real, folder, *more):
    return read_as_train(folder, "validation")


def read_as_train(folder, split):
    rows = checkins.CHECKINS.read(load_artifact(folder, "poi.checkins"))
    rows = rows[rows["split"].isin(["train", split]) & (rows.user_id >= 0)]
    return rows.assign(split="train").reset_index(drop=True)


def tell_the_category(real, instances, rows, *more):
    out = real(instances, rows, *more)
    return out.assign(prompt=out.prompt + rows.category.to_numpy()[instances.target_row])


def tell_the_target(real, instances, rows, *more):
    out = real(instances, rows, *more)
    return out.assign(prompt=out.prompt + out.target_poi.astype(str))


def choose_the_weight_on_test(real, p, split):
    return real(p, "test")


def count_the_target_as_visited(real, city, instances, lists):
    trips = [np.append(x, t) for x, t in zip(instances.prefix, instances.target_row)]
    return real(city, instances.assign(prefix=trips), lists)


def remember_the_target(real, *given):
    out = real(*given)
    return out.assign(history=[[*h, t] for h, t in zip(out.history, out.target_row)])


def remember_the_current_trajectory(real, *given):
    out = real(*given)
    return out.assign(history=[[*h, *x] for h, x in zip(out.history, out.prefix)])


def remember_what_follows(real, rows, prefix, *more):
    return np.append(real(rows, prefix, *more), prefix.max() + 1)


def fine_tune_on_test(real, p):
    folder = load_artifact(p.prompts, "poi.prompts")
    columns = ["instance_id", "user_id", "prompt", "completion"]
    return poi_prompts.PROMPTS["test"].read(folder, columns)


def ask_with_the_answer(real, p):
    table, *more = real(p)
    return table.assign(prompt=table.prompt + table.completion), *more


def count_all_splits(real, rows, *more):
    with patch.object(counters, "find_earlier", lambda times, targets: np.ones(len(times), bool)):
        return real(rows.assign(split="train"), *more)


def count_moves_of_test(real, train, pairs, prefixes, asked, *more):
    place = train.drop_duplicates("poi_id").set_index("poi_id").poi
    last = prefixes.groupby("instance").poi.last().reindex(range(len(asked))).to_numpy()
    moves = pd.DataFrame(dict(before=last, after=place.reindex(asked.target_poi).to_numpy()))
    moves = moves.dropna().astype(int)
    return real(train, pd.concat([pairs, *[moves] * 9], ignore_index=True), prefixes, asked, *more)


def know_every_checkin(real, city, *more):
    return real(city._replace(rows=city.rows.assign(split="train")), *more)


def never_end_the_history(real, city, splits=("train",), cut=None, **limits):
    return real(city, ("train", "validation", "test"), None, **limits)


def end_the_history_with_train(real, city, splits=("train",), cut=None, **limits):
    return real(city, splits, None, **limits)


def query_by_the_category(real, city, instances, *more):
    kinds = city.rows["cat"].to_numpy()[instances.target_row]
    return real(city, instances, *more).assign(last_cat=kinds)


def learn_from_test(real, folder):
    return swap_instances(real(folder), "train")


def choose_by_test(real, folder):
    return swap_instances(real(folder), "validation")


def swap_instances(city, split):
    "A city in which those of test are those of another split too."
    x = city.instances
    test = x[x["split"] == "test"].assign(split=split)
    return city._replace(instances=pd.concat([x[x["split"] != split], test]))


def judge_getnext_by_test(real, *given):
    *more, city = given
    return real(*more, swap_instances(city, "validation"))


def input_the_target(real, city, instances, *more):
    return real(city, add_to_prefixes(instances), *more)


def look_at_every_trajectory(real, city, hyperedges, *more):
    sources = real(city, hyperedges, "now")
    return sources._replace(spans=sources.spans._replace(last=sources.spans.last * 0))


def end_prefixes_too_late(real, *given):
    start, stop, *more = real(*given)
    return start, stop + 1, *more


def judge_sthgcn_by_test(real, p, model, city, x, split):
    asked = city.instances[city.instances["split"] == "test"]
    linked = sthgcn.link_split(p, city, sthgcn.list_trajectories(city), asked)
    return real(p, model, city, x, linked)


def compare_with_the_target(real, folder):
    city = real(folder)
    return city._replace(instances=add_to_prefixes(city.instances))


def count_words_of_all_splits(real, keys, queries, counted=None):
    return real(keys, queries, [*keys, *queries])


def show_the_target_among_the_stays(real, city, instance, *more):
    history, context = real(city, instance, *more)
    return history, np.append(context, instance.target_row)


def name_the_target(real, city, instance, *more):
    return f"{real(city, instance, *more)}\nThe place is {instance.target_poi}."


def see_moves_at_any_time(real, city, *more):
    return {p: (0 * seconds, there) for p, (seconds, there) in real(city, "now").items()}


class Plant(NamedTuple):
    "A leak, and by what it is found."

    recipe: str  # what is built
    found_by: str  # name of a change; or `refused`, where the stage itself refuses
    module: Any
    name: str  # of the function whose place it takes
    leak: Callable


PLANTS = [
    Plant("reviews", "refused", reviews, "build_histories", put_the_row_into_its_history),
    Plant("reviews", "refused", reviews, "build_histories", put_the_next_row_into_a_history),
    Plant("reviews", "test", reviews, "leave_last_out", split_users_without_time),
    Plant("sketch", "round_6", sketch, "build_sketches", show_the_released_sketch),
    Plant("sketch", "round_8", sketch, "build_sketches", see_own_label),
    Plant("sketch", "round_5", sketch, "build_sketches", see_all_ratings_of_the_user),
    Plant("sketch", "round_8", sketch, "list_items", cluster_items_by_ratings),
    Plant("rating_prompts", "round_8", rating_prompts, "build_rating_prompts", rate_the_candidate),
    Plant("rating_prompts", "round_8", rating_prompts, "build_rating_prompts", see_own_label),
    Plant(
        "rating_prompts", "round_5", rating_prompts, "build_rating_prompts", show_the_next_sketch
    ),
    Plant("warm_start", "round_6", warm_start, "build_examples", end_rationales_in_the_label),
    Plant("warm_start", "test", warm_start, "open_prompts", train_on_test),
    Plant("grpo", "test", grpo, "open_prompts", train_on_test),
    Plant("grpo", "test", grpo, "open_prompts", judge_by_test),
    Plant("reasoning", "round_6", reasoning, "select_prompts", hint_at_the_label),
    Plant("alignment", "test", alignment, "open_prompts", train_on_test),
    Plant("alignment", "test", alignment, "open_prompts", judge_by_test),
    Plant("answer_only", "round_8", answer_only, "select_prompts", hint_at_the_label),
    Plant("baselines", "round_8", baselines, "predict_by_factors", fit_factors_on_test),
    Plant("baselines", "round_8", baselines, "predict_by_factors", choose_an_offset_on_test),
    Plant("baselines", "round_8", baselines, "predict_by_means", choose_shrinkage_on_test),
    Plant("baselines", "round_8", baselines, "predict_by_trees", stop_trees_on_test),
    Plant("features", "round_8", baselines, "build_history_features", see_own_label),
    Plant(
        "features", "round_8", baselines, "build_history_features", average_all_ratings_of_an_item
    ),
    Plant("checkins", "test", checkins, "rank_ids", number_all_checkins),
    Plant("checkins", "test", checkins, "split_by_time", split_checkins_without_time),
    Plant(
        "trajectories", "refused", trajectories, "list_instances", put_the_target_into_its_prefix
    ),
    Plant(
        "trajectories", "refused", trajectories, "list_instances", put_what_follows_into_a_prefix
    ),
    Plant("profiles", "test", profiles, "read_train_checkins", describe_users_by_test),
    Plant("profiles", "validation", profiles, "read_train_checkins", describe_users_by_validation),
    Plant("prompts", "own", poi_prompts, "build_prompts", tell_the_category),
    Plant("prompts", "refused", poi_prompts, "build_prompts", tell_the_target),
    Plant("sft", "test", sft, "read_training_prompts", fine_tune_on_test),
    Plant("evaluate", "own", evaluate, "read_prompts", ask_with_the_answer),
    Plant("counters", "own", counters, "predict_counters", count_all_splits),
    Plant("counters", "own", counters, "build_tiers", count_moves_of_test),
    Plant("ranker", "own", ranker, "freeze_history", never_end_the_history),
    Plant("ranker_pairs", "train", ranker, "freeze_history", end_the_history_with_train),
    Plant("ranker_pairs", "train", ranker, "describe_queries", query_by_the_category),
    Plant("ranker", "own", ranker, "load_city", learn_from_test),
    Plant("ranker", "own", ranker, "load_city", choose_by_test),
    Plant("blend", "own", blend, "read_opinions", choose_the_weight_on_test),
    Plant("reranker", "own", reranker, "freeze_history", never_end_the_history),
    Plant("reranker", "own", reranker, "count_on_trip", count_the_target_as_visited),
    Plant("getnext", "own", getnext, "build_flow_graph", know_every_checkin),
    Plant("getnext", "own", getnext, "load_city", learn_from_test),
    Plant("getnext", "own", getnext, "make_getnext_judge", judge_getnext_by_test),
    Plant("getnext", "own", getnext, "stack_trajectories", input_the_target),
    Plant("sthgcn", "own", sthgcn, "collect_sources", look_at_every_trajectory),
    Plant("sthgcn", "own", sthgcn, "make_sthgcn_judge", judge_sthgcn_by_test),
    Plant("sthgcn", "refused", sthgcn, "find_study_prefixes", end_prefixes_too_late),
    Plant("llm4poi", "own", llm4poi, "load_city", compare_with_the_target),
    Plant("llm4poi", "test", llm4poi, "encode_with_tfidf", count_words_of_all_splits),
    Plant("own_history", "refused", poi_prompts, "attach_history", remember_the_target),
    Plant("own_history", "refused", poi_prompts, "attach_history", remember_the_current_trajectory),
    Plant("own_history", "refused", llm4poi, "order_by_time", remember_what_follows),
    Plant("own_history", "own", poi_prompts, "build_prompts", tell_the_category),
    Plant("in_context", "own", in_context, "select_stays", show_the_target_among_the_stays),
    Plant("in_context", "own", in_context, "write_in_context_prompt", name_the_target),
    Plant("agentmove", "own", agentmove, "build_move_graph", see_moves_at_any_time),
    Plant("agentmove", "own", agentmove, "write_agentmove_prompt", name_the_target),
]
