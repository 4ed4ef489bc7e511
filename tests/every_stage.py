"""Every stage of both tasks once, on inputs as small as they can be.

`python every_stage.py OUT FIRST|SECOND`: the second time whatever must not change a result differs:
where folders lie and how their paths are spelled, every parameter that is `runtime()`, the number
of threads, and the state of the process.
"""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def path_to_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


TINY = dict(model_checkpoint="tiny-llama", dtype="float32")
ASKED = dict(mode="exact", provider="local", model_checkpoint="tiny-llama", test_rows=2)
SHORT = dict(max_steps=2, warmup_steps=1, learning_rate=1e-3, train_rows=8)
WRITTEN = dict(max_new_tokens=12, batch_size=4, test_rows=6)
STAGES = [  # stage, parameters, folders that it reads, what makes another result of it
    (
        "poi.checkins",
        dict(dataset="made", num_users=10, num_pois=24, num_days=24),
        {},
        dict(seed=3),
    ),
    ("poi.trajectories", {}, dict(checkins="checkins"), dict(session_time_interval=300)),
    (
        "poi.profiles",
        dict(provider="statistics"),
        dict(checkins="checkins", trajectories="trajectories"),
        {},
    ),
    ("poi.counters", {}, dict(trajectories="trajectories"), dict(split="validation")),
    (
        "poi.llm4poi",
        dict(max_trajectories=2, max_checkins=20),
        dict(trajectories="trajectories"),
        dict(mode="last"),
    ),
    (
        "poi.prompts",
        {},
        dict(trajectories="trajectories", profiles="profiles", llm4poi="llm4poi"),
        dict(profile="none"),
    ),
    (
        "poi.sft",
        TINY | SHORT | dict(tuning="lora", max_length=4096, batch_size=1),
        dict(prompts="prompts"),
        dict(seed=1),
    ),
    (
        "poi.ranker",
        dict(num_trees=4, min_data_in_leaf=5),
        dict(trajectories="trajectories"),
        dict(seed=1),
    ),
    ("poi.evaluate", TINY, dict(prompts="prompts", sft="sft", candidates="ranker"), {}),
    (
        "poi.blend",
        {},
        dict(trajectories="trajectories", ranker="ranker", evaluate="evaluate")
        | dict(evaluate_validation="evaluate_validation"),
        dict(weights=[1]),
    ),
    (
        "poi.reranker",
        TINY | SHORT | dict(num_candidates=4, batch_size=2),
        dict(trajectories="trajectories", ranker="ranker"),
        dict(max_checkins=1),
    ),
    ("poi.getnext", dict(num_epochs=1), dict(trajectories="trajectories"), dict(seed=1)),
    (
        "poi.sthgcn",
        dict(embedding_dim=4, num_heads=2, num_epochs=1, max_steps=4, eval_steps=2),
        dict(trajectories="trajectories"),
        dict(seed=1),
    ),
    (
        "poi.in_context",
        ASKED | dict(history_stays=2),
        dict(trajectories="trajectories"),
        dict(method="LLM-ZS"),
    ),
    (
        "poi.agentmove",
        ASKED | dict(history_stays=2, max_new_tokens=4),
        dict(trajectories="trajectories"),
        dict(world=False),
    ),
    ("poi.analyses", {}, {}, {}),
    ("poi.audit", {}, dict(analysis="analyses"), {}),
    ("rating.reviews", dict(num_users=12, num_items=24), {}, dict(seed=1)),
    ("rating.sketch", dict(n_clusters=3, top_k=5), dict(reviews="reviews"), dict(as_shipped=True)),
    (
        "rating.prompts",
        dict(max_history=2, tokenizer="tiny-qwen"),
        dict(reviews="reviews", sketch="sketch"),
        dict(max_history=3),
    ),
    (
        "rating.warm_start",
        TINY | SHORT | dict(model_checkpoint="tiny-qwen", tuning="full", batch_size=2),
        dict(prompts="rating.prompts"),
        {},
    ),
    (
        "rating.grpo",
        TINY
        | dict(num_generations=2, prompts_per_step=2, batch_size=4, max_new_tokens=12, max_steps=1)
        | dict(train_rows=4, validation_rows=2, eval_steps=1, learning_rate=1e-3),
        dict(prompts="rating.prompts", model_checkpoint="warm_start/model"),
        {},
    ),
    (
        "rating.reasoning",
        TINY | dict(train_rows=6, max_new_tokens=12, batch_size=4),
        dict(prompts="rating.prompts", model_checkpoint="warm_start/model", grpo="grpo"),
        {},
    ),
    (
        "rating.alignment",
        TINY | SHORT | dict(kd_ratio=0, validation_rows=2, eval_steps=2),
        dict(prompts="rating.prompts", model_checkpoint="warm_start/model", grpo="grpo"),
        {},
    ),
    (
        "rating.answer_only",
        TINY | dict(batch_size=4, test_rows=6),
        dict(prompts="rating.prompts", model_checkpoint="warm_start/model")
        | dict(grpo="grpo", alignment="alignment"),
        dict(test_rows=5),
    ),
    ("rating.baselines", {}, dict(reviews="reviews"), {}),
    ("poi.elsewhere", {}, dict(trajectories="trajectories"), {}),
    ("rating.elsewhere", {}, dict(reviews="reviews"), {}),
    ("rating.audit", {}, {}, {}),
]


TWICE = ("rating.prompts", "rating.audit", "rating.elsewhere")  # names of stages of both tasks
RUNS = {  # stage → its function, of every module that is a command
    module.run.stage: module.run
    for path in sorted((ROOT / "recnb").rglob("*.py"))
    if "\nrun_as_command(run, __name__)" in path.read_text(encoding="utf-8")
    for module in [importlib.import_module(path_to_name(path))]
    if hasattr(module.run, "stage")
}


def write_sources(base):
    "Released files, made up: answers of GenUP, and the five files of SIREN."
    import pandas as pd

    file = "Llama-2-7b-longlora-32k-merged-FourSquare-NYC-POI-FourSquare-NYC-POI"
    answers = pd.DataFrame(dict(i=range(8), target="7", pred=["7", "8"] * 4, file=file))
    answers.to_parquet(base / "stored.parquet")
    shutil.copytree(ROOT / "papermill_runs/published", base / "published")
    past = "A, X|Drama, 5\nB, X|Drama, 5\nC, X|Horror, 1\nD, X|Western, 2\n"
    likes = (
        "The user likes these book topics:\n- Drama\n\nand dislikes these book topics:\n- Horror"
    )
    rows = dict(train=("d", 2.0, "D, X|Western"), valid=("e", 4.0, "E, X|Drama"))
    rows |= dict(test=("f", 5.0, "F, X|Drama"))
    records = dict(history_asins=[*"abcd"], history_ratings=[5, 5, 1, 2], history=past.strip())
    files = dict(history=records, user_feature=dict(user_profile_prompt=likes))
    for time, (name, (item, label, target)) in enumerate(rows.items()):
        row = dict(parent_asin=item, timestamp=1_600_000_000_000 + time, label=label, target=target)
        files[name] = row | dict(history=past)
    (base / "siren").mkdir()
    for name, record in files.items():
        text = json.dumps(dict(user_id="u", **record)) + "\n"
        (base / f"siren/{name}.jsonl").write_text(text)


def write_predictions(base, name):
    "What another program might say of the stages' test instances or rows."
    import pandas as pd

    task = name.partition(".")[0]
    tests = pd.read_parquet(
        base / ("trajectories/instances.parquet" if task == "poi" else "reviews/rows.parquet")
    ).query("split == 'test'")
    own = (
        dict(instance_id=tests.instance_id, top=[[1, 2]] * len(tests))
        if task == "poi"
        else dict(row_id=tests.row_id, rating=4.5)
    )
    pd.DataFrame(own).to_parquet(base / f"{task}.parquet")
    return f"{base}/{task}.parquet"


def vary(values, Params):
    "The same parameters with another value of each that is `runtime()`."
    other = dict(concurrency=3, batch_size=3, save_steps=1, timeout=9.0, pause=0.5, backoff=2.0)
    other |= dict(request_attempts=2, device="cpu", base_url="http://localhost:9/v1")
    other |= dict(num_workers=1, vllm_server_base_url="http://localhost:9")
    other |= dict(api_key_variable="NO_KEY", nominatim="http://localhost:9", report_to="none")
    free = {f.name for f in dataclasses.fields(Params) if f.metadata.get("runtime")}
    return values | {name: other[name] for name in free}


def make_all(base, second):
    "stage → [key, hash of its files, and both of a variant]"
    base.mkdir(parents=True)
    write_sources(base)
    given = dict(
        analyses=dict(stored=f"{base}/stored.parquet", published=f"{base}/published"),
        audit=dict(stored=f"{base}/stored.parquet", published=f"{base}/published"),
    )
    given["rating.audit"] = dict(data=f"{base}/siren")
    made = {}
    for name, values, folders, variant in STAGES:
        run = RUNS[name]
        place = name if name in TWICE else name.split(".")[1]
        values = values | {k: f"{base}/{v}" for k, v in folders.items()} | given.get(place, {})
        if place.endswith("elsewhere"):
            values["predictions"] = write_predictions(base, name)
        if second:
            values = vary(values, run.Params)
        if place == "evaluate":  # a blend needs both splits
            run(values, split="validation", out=f"{base}/evaluate_validation")
        a = run(values, out=f"{base}/{place}")
        made[name] = [a.manifest["key"], a.digest]
        if variant and not second:
            b = run(values | variant, out=f"{base}/{place}_variant")
            made[name] += [b.manifest["key"], b.digest]
    return made


if __name__ == "__main__":
    base, which = sys.argv[1:]
    print(json.dumps(make_all(Path(base), which == "SECOND")))
