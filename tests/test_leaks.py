"Nothing that is learnt, chosen or asked has seen what it must not; every planted leak is caught."

import functools
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from leaks import City, Reviews, find_differences, read_outputs
from planted import PLANTS

from recnb import poi, rating
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
    asking,
    baselines,
    grpo,
    reasoning,
    reviews,
    sketch,
    warm_start,
)
from recnb.rating import prompts as rating_prompts
from recnb.stages import BadInput

LLAMA = dict(model_checkpoint="tiny-llama", dtype="float32")
QWEN = dict(model_checkpoint="tiny-qwen", dtype="float32")
ASKED = dict(mode="exact", provider="local", history_until="now", **LLAMA)
WIDTHS = dict.fromkeys("poi_dim user_dim time_dim category_dim map_dim feedforward_dim".split(), 4)


def describe_ranker_pairs(world, out):
    "What the trees are given, with one row per pair; labels apart."
    import lightgbm

    given = []

    class Dataset(lightgbm.Dataset):
        def __init__(self, data, label=None, **more):
            given.append(pd.DataFrame(np.asarray(data)))
            super().__init__(data, label, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightgbm, "Dataset", Dataset)
        build_ranker(world, out)
    return {f"pairs {i}": x for i, x in enumerate(given)}


def describe_grpo_rows(world, out):
    "What GRPO learns from and what chooses its weights; it stops before it learns."
    seen = {}

    class Stop(Exception):
        pass

    def note_training(p, folder, steps, policy, data):
        seen["trained"] = data.to_pandas().drop(columns="row_id")

    def note_judging(tokenizer, texts, labels, *more):
        seen["judged"] = pd.DataFrame(dict(text=texts, value=labels))
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(grpo, "build_grpo_trainer", note_training)
        patch.setattr(grpo, "make_grpo_judge", note_judging)
        grpo.run(prompts=world.built["prompts"], out=out, **QWEN)
    return seen


def build_reasoning(world, out):
    "The rationales, and the questions that led to them."
    asked = []

    def note_questions(*given):
        asked.append(asking.render_questions(*given))
        return asked[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning, "render_questions", note_questions)
        options = dict(train_rows=12, max_new_tokens=2, **QWEN)
        built = reasoning.run(prompts=world.built["prompts"], out=out, **options)
    return read_outputs(built) | dict(questions=asked[0])


def describe_rating_features(world, out):
    "What the trees of the ratings are given."
    df = reviews.INTERACTIONS.read(world.built["reviews"])
    rows = reviews.ROWS.read(world.built["reviews"])
    return dict(features=baselines.build_history_features(df, rows).reset_index())


def build_ranker(world, out):
    options = dict(num_trees=10, min_data_in_leaf=5, num_models=2)
    return ranker.run(trajectories=world.built["trajectories"], out=out, **options)


def build_blend(world, out):
    "A ranker, a model that is asked about its candidates on both splits, and the weight."
    trees = build_ranker(world, f"{out}-ranker")
    given = dict(prompts=world.built["prompts"], candidates=trees, **LLAMA)
    told = dict(trajectories=world.built["trajectories"], ranker=trees)
    told["evaluate"] = evaluate.run(given, out=f"{out}-test")
    asked = evaluate.run(given, split="validation", out=f"{out}-validation")
    return blend.run(told, evaluate_validation=asked, out=out)


def build_reranker(world, out):
    "A ranker, and a model that learns to choose from its lists."
    trees = build_ranker(world, f"{out}-ranker")
    short = dict(num_candidates=4, max_steps=2, weights=[1], **LLAMA)
    return reranker.run(short, trajectories=world.built["trajectories"], ranker=trees, out=out)


def build_llm4poi_prompts(world, out):
    "The prompts of LLM4POI: with similar trajectories of everybody, and no profile."
    T = world.built["trajectories"]
    H = llm4poi.run(trajectories=T, out=f"{out}-histories", max_trajectories=5)
    return poi_prompts.run(trajectories=T, llm4poi=H, profile="none", out=out)


def build_own_history(world, out):
    "The prompts that tell the user's own last check-ins in short."
    T = world.built["trajectories"]
    how = dict(mode="last", history_until="now")
    H = llm4poi.run(trajectories=T, out=f"{out}-histories", **how)
    given = dict(trajectories=T, llm4poi=H, compact_history=True, profile="none")
    return poi_prompts.run(given, max_length=250, tokenizer="tiny-llama", out=out)


def make_builder(stage, *names, **options):
    "Function of a world and a folder that runs a stage on what the world has built."
    return lambda w, out: stage.run(out=out, **{n: w.built[n] for n in names}, **options)


class Recipe(NamedTuple):
    "A stage, how it is built, and the changes after which nothing of it may differ."

    stage: object  # module
    world: type
    changes: str
    build: Callable  # function of a world and a folder: what the stage wrote, or name → table


LATE = "validation own test"
EVER = "early train validation own test"  # where train itself must not see what is later
ROUNDS = " ".join(Reviews.changes)
TUNED = dict(training_ratio=1.0, train_rows=6, max_steps=2, validation_rows=6, eval_steps=1)
SHOWN = dict(train_rows=12, batch_size=12, max_steps=1, warmup_steps=0)
SMALL = dict(embedding_dim=4, num_heads=2, max_steps=4, eval_steps=2, history_until="now")
RECIPES = dict(
    checkins=Recipe(checkins, City, EVER, lambda w, out: checkins.run(**w.reading, out=out)),
    trajectories=Recipe(trajectories, City, EVER, make_builder(trajectories, "checkins")),
    profiles=Recipe(profiles, City, LATE, make_builder(profiles, "checkins", "trajectories")),
    prompts=Recipe(poi_prompts, City, LATE, make_builder(poi_prompts, "trajectories", "profiles")),
    plain_prompts=Recipe(
        poi_prompts, City, EVER, make_builder(poi_prompts, "trajectories", profile="none")
    ),
    llm4poi=Recipe(llm4poi, City, LATE, build_llm4poi_prompts),
    own_history=Recipe(poi_prompts, City, EVER, build_own_history),
    last_checkins=Recipe(
        llm4poi,
        City,
        EVER,
        make_builder(llm4poi, "trajectories", mode="last", history_until="now"),
    ),
    sft=Recipe(
        sft,
        City,
        "validation",
        make_builder(sft, "prompts", tuning="lora", train_rows=8, max_steps=2, **LLAMA),
    ),
    evaluate=Recipe(evaluate, City, "own", make_builder(evaluate, "prompts", **LLAMA)),
    counters=Recipe(counters, City, "own", make_builder(counters, "trajectories")),
    counters_on_validation=Recipe(
        counters, City, LATE, make_builder(counters, "trajectories", split="validation")
    ),
    ranker=Recipe(ranker, City, "own test", build_ranker),
    ranker_pairs=Recipe(ranker, City, "train", describe_ranker_pairs),
    blend=Recipe(blend, City, "own", build_blend),
    reranker=Recipe(reranker, City, "own", build_reranker),
    getnext=Recipe(
        getnext,
        City,
        "own test",
        make_builder(getnext, "trajectories", num_epochs=2, gcn_dims=[4], **WIDTHS),
    ),
    sthgcn=Recipe(sthgcn, City, "own test", make_builder(sthgcn, "trajectories", **SMALL)),
    in_context=Recipe(in_context, City, "own", make_builder(in_context, "trajectories", **ASKED)),
    agentmove=Recipe(
        agentmove, City, "own", make_builder(agentmove, "trajectories", world=False, **ASKED)
    ),
    reviews=Recipe(reviews, Reviews, ROUNDS, lambda w, out: reviews.run(**w.reading, out=out)),
    sketch=Recipe(sketch, Reviews, ROUNDS, make_builder(sketch, "reviews", n_clusters=5, top_k=6)),
    rating_prompts=Recipe(
        rating_prompts,
        Reviews,
        ROUNDS,
        make_builder(rating_prompts, "reviews", "sketch", max_history=4),
    ),
    features=Recipe(baselines, Reviews, ROUNDS, describe_rating_features),
    baselines=Recipe(
        baselines, Reviews, "round_8 test", make_builder(baselines, "reviews", num_trees=10)
    ),
    warm_start=Recipe(
        warm_start,
        Reviews,
        "round_6",
        make_builder(warm_start, "prompts", **SHOWN, **QWEN),
    ),
    grpo=Recipe(grpo, Reviews, "test", describe_grpo_rows),
    reasoning=Recipe(reasoning, Reviews, "round_6", build_reasoning),
    alignment=Recipe(
        alignment,
        Reviews,
        "test",
        make_builder(alignment, "prompts", kd_ratio=0, **TUNED, **QWEN),
    ),
    answer_only=Recipe(
        answer_only, Reviews, "round_8", make_builder(answer_only, "prompts", **QWEN)
    ),
)
# they measure what others have predicted or published
MEASURES = {"poi.analyses", "poi.audit", "poi.elsewhere", "rating.audit", "rating.elsewhere"}


def test_every_stage_has_a_recipe():
    names = [f"{p.__name__}.{m.name}" for p in (poi, rating) for m in iter_modules(p.__path__)]
    runs = (getattr(import_module(name), "run", None) for name in names)
    stages = {run.stage for run in runs if hasattr(run, "stage")}
    assert stages == {r.stage.run.stage for r in RECIPES.values()} | MEASURES


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    "Function of a task and a change: its world, made once."
    room = tmp_path_factory.mktemp("worlds")

    @functools.cache
    def make(task, change=None):
        where = room / task.__name__ / (change or "plain")
        return task(where, change and task.changes[change])

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_has_seen_what_it_must_not(name, worlds, tmp_path):
    _, task, changes, build = RECIPES[name]
    plain = worlds(task)
    known = read_outputs(build(plain, f"{tmp_path}/plain"))
    found = {
        change: find_differences(build, plain, worlds(task, change), tmp_path / change, known)
        for change in changes.split()
    }
    assert known and found == dict.fromkeys(found, [])


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.recipe}-{plant.leak.__name__}")
def test_a_planted_leak_is_caught(plant, worlds, monkeypatch, tmp_path):
    _, task, _, build = RECIPES[plant.recipe]
    made = [worlds(task)]
    if plant.found_by != "refused":
        made.append(worlds(task, plant.found_by))
    real = getattr(plant.module, plant.name)
    monkeypatch.setattr(plant.module, plant.name, functools.partial(plant.leak, real))
    if plant.found_by == "refused":
        with pytest.raises((BadInput, AssertionError)):
            build(made[0], f"{tmp_path}/refused")
    else:
        assert find_differences(build, *made, tmp_path)
