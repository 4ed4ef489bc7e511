"The evaluate stage as a user meets it: commands, shared work, kills, bad input."

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

import recnb.poi.evaluate as evaluate
from recnb.artifacts import stage, write_json, write_parquet
from recnb.stages import BadInput

pytest.importorskip("torch")


@dataclass
class Made:
    out: str
    n: int = 40


@stage("poi.prompts", Made)
def prompts(p, folder):
    n = max(p.n, 1)
    t = pd.DataFrame(
        dict(instance_id=[i + 100 for i in range(n)], user_id=[i // 3 for i in range(n)])
    )
    t["target_poi"] = [i * 7 % 140 for i in range(n)]
    t["prompt"] = [
        f"<s>[INST] User {u} was at {'POI 12, then at ' * (i % 5)}POI {i}. [/INST] "
        for i, u in enumerate(t.user_id)
    ]
    t["answer_prefix"] = [f"At 18:00 user {u} goes to POI " for u in t.user_id]
    t["completion"] = t.answer_prefix + t.target_poi.astype(str) + ". </s>"
    write_parquet(t[: p.n], folder / "test.parquet")
    write_json(dict(ids=[*range(130)], terminator="."), folder / "catalogue.json")


@stage("poi.sft", Made)
def sft(p, folder):
    import recnb.models as m

    model = m.add_lora(m.load_model("tiny-llama")[0])
    for name, w in model.named_parameters():
        w.data += 0.05 * ("lora_B" in name)
    model.save_pretrained(folder / "adapter")
    m.record_base_model(folder, "tiny-llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("evaluate")
    prompts(Made(f"{d}/prompts")), sft(Made(f"{d}/sft"))
    return d


def params(d, **kw):
    return evaluate.Params(
        **dict(prompts=f"{d}/prompts", model_checkpoint="tiny-llama", out=f"{d}/out") | kw
    )


def run(d, **kw):
    return evaluate.run(params(d, **kw)).path


def files(folder):
    return {f: (Path(folder) / f).read_bytes() for f in ("predictions.parquet", "metrics.json")}


@pytest.fixture
def one_thread():
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_predictions(made):
    out = run(made, sft=f"{made}/sft", out=f"{made}/first")
    t, m = (
        pd.read_parquet(out / "predictions.parquet"),
        json.loads((out / "metrics.json").read_text()),
    )
    assert t.columns.tolist() == ["instance_id", "target_poi", "rank", "top", "logprob", "text"]
    assert t.instance_id.tolist() == [i + 100 for i in range(40)]
    outside = t.target_poi >= 130
    assert outside.any() and (t["rank"].isna() == outside).all()
    assert m["Acc@1"]["n"] == 40 and m["target outside catalogue"]["value"] == outside.mean()
    for r in t[~outside].itertuples():
        assert len(set(r.top)) == 20 and all(a >= b for a, b in zip(r.logprob, r.logprob[1:]))
        assert r.top[r.rank - 1] == r.target_poi if r.rank <= 20 else r.target_poi not in r.top
    assert sorted(f.name for f in out.iterdir() if f.suffix != ".lock") == [
        "manifest.json",
        "metrics.json",
        "predictions.parquet",
    ]


def test_adapter_counts_and_merging_does_not(made, monkeypatch):
    import recnb.models as m

    def logprob(**given):
        return pd.read_parquet(run(made, **given) / "predictions.parquet").logprob[0]

    base = logprob(out=f"{made}/base")
    merged = logprob(out=f"{made}/merged", sft=f"{made}/sft")
    load = m.load_adapter
    monkeypatch.setattr(m, "load_adapter", lambda model, folder, merge: load(model, folder, False))
    apart = logprob(out=f"{made}/apart", sft=f"{made}/sft")
    assert abs(base - merged).max() > 1e-3
    assert abs(apart - merged).max() < 1e-4


def test_two_processes_write_the_same_bytes(made, one_thread, copies):
    alone = files(run(made, sft=f"{made}/sft", out=f"{made}/alone"))
    shared = params(made, sft=f"{made}/sft", out=f"{made}/shared")
    copies.run("recnb.poi.evaluate", shared, processes=2)
    assert files(made / "shared") == alone
    assert json.loads((made / "shared/manifest.json").read_text())["processes"] == 2


def test_draws_do_not_depend_on_sharing(made, monkeypatch, tmp_path):
    p = params(made, mode="sampled", preset="llama3", temperature=2.0)
    whole = pd.read_parquet(
        run(made, mode="sampled", preset="llama3", temperature=2.0, out=f"{made}/drawn")
        / "predictions.parquet"
    )
    table, ids, terminator = evaluate.read_prompts(p)
    model, tokenizer = evaluate.load_evaluated_model(p)
    answer = evaluate.make_answerer(
        p, model, tokenizer, evaluate.build_catalogue_trie(tokenizer, table, ids, terminator)
    )
    parts = evaluate.plan_parts(table, tokenizer)
    assert len(parts) > 1
    for k in (1, 0):
        monkeypatch.setenv("RANK", str(k)), monkeypatch.setenv("WORLD_SIZE", "2")
        answers = evaluate.answer_in_parts(answer, table, parts, tmp_path)
    assert [x["text"] for x in answers] == whole.text.tolist()
    assert whole.text.nunique() > 1


def test_batches_and_the_whole_walk_give_the_same_ranks(made, monkeypatch, one_thread):
    import recnb.ranking as ranking

    monkeypatch.setattr(ranking, "WHOLE", 0)  # so that the small catalogue is searched

    def rank(name, **more):
        return pd.read_parquet(
            run(made, sft=f"{made}/sft", out=f"{made}/{name}", **more) / "predictions.parquet"
        )

    found = rank("searched")
    walked = rank("walked", rank_limit=None)
    batched = rank("batched", batch_size=8)
    assert (walked["rank"] > 20).any() and found["rank"].max() <= 20
    for t in (found, batched):
        assert t["rank"].equals(walked["rank"].where(walked["rank"] <= 20))
        for top, best in zip(t.top, walked.top):
            assert len(top) and top.tolist() == best[: len(top)].tolist()


def test_killed_and_taken_up(tmp_path, monkeypatch, one_thread, copies):
    prompts(Made(f"{tmp_path}/prompts", n=240))
    parts = tmp_path / "out.partial/parts"
    copies.kill("recnb.poi.evaluate", params(tmp_path), lambda: any(parts.glob("1/*.jsonl")))
    assert not (tmp_path / "out").exists() and 0 < len(list(parts.glob("1/*.jsonl"))) < 15
    (parts / "32").mkdir()  # begun on a card, in parts of another size
    (parts / "32/00000000.jsonl").write_text("{}\n")
    calls = []
    exact = evaluate.read_search
    monkeypatch.setattr(evaluate, "read_search", lambda *a: calls.append(1) or exact(*a))
    after = files(run(tmp_path))
    assert 0 < len(calls) < 240
    assert files(run(tmp_path, out=f"{tmp_path}/again")) == after


def test_finished_work_is_reused(made, monkeypatch):
    run(made, first_rows=4, out=f"{made}/four")
    monkeypatch.setattr(evaluate, "read_search", None)
    assert (
        len(pd.read_parquet(run(made, first_rows=4, out=f"{made}/four") / "predictions.parquet"))
        == 4
    )


def test_greedy_and_length_from_the_catalogue(made):
    a, b = (
        pd.read_parquet(
            run(
                made,
                mode="sampled",
                temperature=0,
                max_new_tokens=None,
                seed=s,
                first_rows=6,
                out=f"{made}/greedy{s}",
            )
            / "predictions.parquet"
        )
        for s in (1, 2)
    )
    assert a.text.tolist() == b.text.tolist()


@pytest.mark.parametrize(
    "text, rank, top",
    [
        ("12.", 1, [12]),
        ("012.", None, []),
        ("1 2", 1, [12]),
        ("", None, []),
        ("99", None, []),
        ("１２", None, []),
        ("13", None, [13]),
    ],
)
def test_reading_a_sampled_answer(text, rank, top):
    found = evaluate.read_sampled_answer(text, 12, {"12", "13"})
    assert (found["rank"], found["top"], found["text"]) == (rank, top, text)


def test_reasoning(made):
    out = run(made, use_cot=True, max_think_tokens=4, first_rows=2, out=f"{made}/cot")
    t = pd.read_parquet(out / "predictions.parquet")
    assert t.text.str.endswith("</think>").all() and t["rank"].notna().all()


def test_a_wrong_ranking_stops_the_stage(made, monkeypatch):
    monkeypatch.setattr(
        evaluate,
        "score_catalogue",
        lambda *a: evaluate.score_by_brute_force(*a[:4], a[3].ids, a[4]) + 0.1,
    )
    with pytest.raises(RuntimeError, match="brute force"):
        run(made, first_rows=2, out=f"{made}/wrong")


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(model_checkpoint="./nowhere"), "nowhere"),
        (dict(split="validation"), "validation"),
        (dict(mode="exacct"), "exact"),
        (dict(tempreature=1), "temperature"),
        (dict(sft="{d}/prompts"), "poi.sft"),
        (dict(prompts="{d}/none"), "none"),
    ],
)
def test_bad_input_is_one_line(made, wrong, says, copies):
    given = dict(prompts="{d}/prompts", out="{d}/bad", model_checkpoint="tiny-llama") | wrong
    given = {name: str(value).format(d=made) for name, value in given.items()}
    assert says in copies.refuse("recnb.poi.evaluate", given)


def test_unknown_model(made):
    with pytest.raises(BadInput, match="smollm3"):
        run(made, model_checkpoint="smollm3")


def test_no_prompts(tmp_path):
    prompts(Made(f"{tmp_path}/prompts", n=0))
    with pytest.raises(BadInput, match="at least one prompt"):
        run(tmp_path)


def test_model_of_another_adapter(made):
    import recnb.models as m

    trained = stage("poi.sft", Made)(lambda p, folder: m.record_base_model(folder, "tiny-qwen"))
    trained(Made(f"{made}/other"))
    with pytest.raises(BadInput, match="tiny-qwen"):
        run(made, sft=f"{made}/other")


def test_changed_prompts_are_refused(tmp_path):
    prompts(Made(f"{tmp_path}/prompts"))
    (tmp_path / "prompts/catalogue.json").write_text('{"ids": [1], "terminator": "."}')
    with pytest.raises(BadInput, match="changed"):
        run(tmp_path)
