"In-context prompts: fields by hand, nothing of the future, all answers, the same after a stop."

import json

import numpy as np
import pandas as pd
import pytest

from recnb import llm
from recnb.poi import checkins, in_context, trajectories
from recnb.poi.city import City, load_city
from recnb.poi.evaluate import tabulate_predictions
from recnb.stages import BadInput


def by_hand():
    "User 1 was at 0 and 1 on Monday, is at 2 and 3 on Tuesday, goes to 4; user 2 is always at 4."

    def row(u, p, when, trajectory, split):
        return dict(
            user_id=u, poi_id=p, local_time=pd.Timestamp(when), trajectory=trajectory, split=split
        )

    rows = pd.DataFrame(
        [
            row(1, 0, "2012-04-02 08:10", "a", "train"),
            row(1, 1, "2012-04-02 12:30", "a", "train"),
            row(2, 4, "2012-04-02 13:00", "b", "train"),
            row(1, 2, "2012-04-03 09:00", "c", "test"),
            row(1, 3, "2012-04-03 18:45", "c", "test"),
            row(1, 4, "2012-04-03 23:05", "c", "test"),
            row(1, 4, "2012-04-04 10:00", "d", "train"),
        ]
    )
    rows["seconds"] = rows.local_time.astype("datetime64[s]").astype("int64")
    instances = pd.DataFrame(
        [
            dict(
                instance_id=0,
                split="test",
                user_id=1,
                prefix=np.array([3, 4]),
                target_poi=4,
                target_row=5,
                target_time=rows.local_time[5],
            )
        ]
    )
    return City(rows, instances, np.arange(5), np.array([1, 2]), np.array([0]))


@pytest.mark.parametrize(
    "method, lines",
    [
        (
            "LLM-Mob",
            [
                "<history>: [(08:10 AM, Monday, 0), (12:30 PM, Monday, 1)]",
                "<context>: [(09:00 AM, Tuesday, 2), (06:45 PM, Tuesday, 3)]",
                "<next>: (11:05 PM, Tuesday, ?)",
            ],
        ),
        (
            "LLM-ZS",
            [
                "<historical_stays>: [(8 AM, Monday, 0), (12 PM, Monday, 1)]",
                "<context_stays>: [(9 AM, Tuesday, 2), (6 PM, Tuesday, 3)]",
                "<target_stay>: (11 PM, Tuesday, ?)",
            ],
        ),
    ],
)
def test_fields(method, lines):
    city = by_hand()
    p = in_context.Params(trajectories="", out="", method=method)
    mine = in_context.group_by_user(city)
    text = in_context.write_in_context_prompt(city, city.instances.iloc[0], p, mine)
    at = [text.index(line) for line in lines]
    assert (
        at == sorted(at) and text.count("Monday") == 2
    )  # fields in their order; nothing of user 2, nor of Wednesday
    short = in_context.write_in_context_prompt(
        city,
        city.instances.iloc[0],
        in_context.Params(
            trajectories="",
            out="",
            method=method,
            history_stays=1,
            context_stays=1,
            use_target_time=False,
        ),
        mine,
    )
    assert "Monday, 0" not in short and "Tuesday, 2" not in short and "11" not in short


def test_planted_leak_is_caught():
    city = by_hand()
    in_context.check_stays(
        city, city.instances, in_context.Params(trajectories="", out="", history_until="now")
    )
    for rows in ([5], [6], [2]):  # the target, a later stay, another user's

        def leaky(*_, rows=rows):
            return np.array(rows), np.array([3, 4])

        with pytest.raises(BadInput, match=f"instance 0.*row {rows[0]}"):
            in_context.check_stays(
                city, city.instances, in_context.Params(trajectories="", out=""), leaky
            )


@pytest.fixture(scope="module")
def T(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    C = checkins.run(
        dataset="made", num_users=40, num_pois=40, num_days=60, seed=2, out=str(d / "c")
    )
    return trajectories.run(checkins=C.path, out=str(d / "t"))


def test_answers_of_every_kind(T, tmp_path):
    "Answers: right at once, third after an unknown id, unreadable twice, readable at last."
    city = load_city(T.path)
    some = city.instances[city.instances.split == "test"].head(4)
    p = in_context.Params(
        trajectories=str(T.path),
        out=str(tmp_path / "o"),
        provider="replay",
        replay=str(tmp_path / "answers.jsonl"),
    )
    mine = in_context.group_by_user(city)
    questions = {
        int(i.instance_id): in_context.write_in_context_prompt(city, i, p, mine)
        for i in some.itertuples()
    }
    targets = dict(zip(some.instance_id, some.target_poi))
    a, b, c, d = questions
    other = next(int(x) for x in city.catalogue if x not in targets.values())
    good = {i: json.dumps(dict(prediction=[int(targets[i])], reason="habit")) for i in questions}
    said = {
        a: [good[a]],
        b: [json.dumps(dict(prediction=[10**6, other, int(targets[b])]))],
        c: ["no idea", "none"],
        d: ["{", good[d]],
    }
    turns = {i: iter(x) for i, x in said.items()}

    def model(request):
        return dict(
            text=next(
                turns[
                    next(i for i, q in questions.items() if q in request["messages"][0]["content"])
                ]
            ),
            finish_reason="stop",
            prompt_tokens=1,
            completion_tokens=1,
        )

    form = in_context.make_answer_schema()
    requests = {
        i: llm.build_request(
            q,
            llm.choose_model(p),
            form,
            p.json_mode,
            temperature=p.temperature,
            max_tokens=p.max_new_tokens,
        )
        for i, q in questions.items()
    }
    llm.collect_answers(
        llm.Recorder(tmp_path / "answers.jsonl", model),
        requests,
        form,
        answer_attempts=p.answer_attempts,
    )
    out, facts = in_context.ask_for_rankings(
        p, questions, targets, city.catalogue, tmp_path, llm.open_answers(p, tmp_path)
    )
    t = tabulate_predictions(some, out)
    assert (
        t["rank"].tolist()[:2] == [1, 3]
        and pd.isna(t["rank"][2])
        and t["rank"][3] == 1
        and t.text[2].startswith("failed")
    )
    assert facts["readable"] == 0.75 and facts["outside_catalogue"] == 0.2


def test_exact_ranks_are_those_of_teacher_forcing_and_survive_a_stop(T, tmp_path, monkeypatch):
    from recnb import models, ranking

    values = dict(
        trajectories=T.path,
        mode="exact",
        provider="local",
        model_checkpoint="tiny-llama",
        test_rows=20,
        history_stays=4,
    )
    whole = pd.read_parquet(in_context.run(values, out=str(tmp_path / "a")) / "predictions.parquet")
    city, p = (
        load_city(T.path),
        in_context.Params(**values, out=str(tmp_path / "a")),
    )
    model, tokenizer = models.load_model("tiny-llama")
    i = city.instances.set_index("instance_id", drop=False).loc[whole.instance_id[0]]
    mine = in_context.group_by_user(city)
    text = in_context.render_with_opening(
        tokenizer, in_context.write_in_context_prompt(city, i, p, mine)
    )
    trie = ranking.Trie(tokenizer, city.catalogue, in_context.ANSWER_OPENING, ",")
    scores = ranking.score_by_brute_force(model, tokenizer, text, trie, trie.ids, "constrained")
    assert trie.ids[np.argmax(scores)] == whole.top[0][0]
    divided = pd.read_parquet(
        in_context.run(values, test_rows=3, calibrate=True, out=str(tmp_path / "c"))
        / "predictions.parquet"
    )
    taste = ranking.score_by_brute_force(
        model,
        tokenizer,
        in_context.render_with_opening(tokenizer, in_context.write_blank_prompt(p)),
        trie,
        trie.ids,
        "constrained",
    )
    j = city.instances.set_index("instance_id", drop=False).loc[divided.instance_id[0]]
    ratio = (
        ranking.score_by_brute_force(
            model,
            tokenizer,
            in_context.render_with_opening(
                tokenizer, in_context.write_in_context_prompt(city, j, p, mine)
            ),
            trie,
            trie.ids,
            "constrained",
        )
        - taste
    )
    assert (
        divided["rank"][0] == 1 + (ratio > ratio[list(trie.ids).index(divided.target_poi[0])]).sum()
    )
    calls = []
    write = in_context.write_jsonl

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(in_context, "write_jsonl", stops)
    with pytest.raises(KeyboardInterrupt):
        in_context.run(values, out=str(tmp_path / "b"))
    again = pd.read_parquet(in_context.run(values, out=str(tmp_path / "b")) / "predictions.parquet")
    assert whole.equals(again) and len(calls) == 3


def test_bad_input(T, tmp_path):
    for more, said in (
        (dict(mode="exact"), "--provider local"),
        (dict(provider="replay"), "--replay FILE"),
    ):
        with pytest.raises(BadInput, match=said):
            in_context.run(trajectories=T.path, out=str(tmp_path / "x"), **more)
