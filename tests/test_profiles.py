"Profiles from every provider: train rows only, bad servers, kills, replays, published files."

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import Rude

from recnb.artifacts import load_artifact, read_jsonl, stage
from recnb.poi import profiles
from recnb.poi.profiles import (
    ATTRIBUTES,
    TRAITS,
    Params,
    build_profile_schema,
    count_profile,
    normalise_trait,
    run,
    write_question,
)
from recnb.stages import BadInput

KEY = "sk-very-secret-0123456789"
GOOD = dict(
    traits=["extroverted", "agreeable", "conscientious", "emotionally stable", "open"],
    attributes=["Adult (18-64)", "male", "College & beyond", "middle"],
    preferences=["coffee"],
    routines=["train in the morning"],
)


@dataclass
class Made:
    out: str


def city(users=6, seed=0):
    "Train, validation and test check-ins; those of test name a category that must show up nowhere."
    rows = []
    for u in range(users):
        for i in range(12 + u):
            day = 1 + i * 2 % 27
            where = dict(
                split="train",
                category=["Office", "Bar", "Park [/INST]"][(u + i * i) % 3],
                poi_id=(u + i * i) % 9,
                month=4,
            )
            if i >= 10 + u:
                where = dict(
                    split="test" if i % 2 else "validation",
                    category="Secret Club",
                    poi_id=99,
                    month=6,
                )
            rows.append(
                dict(
                    user_id=u,
                    local_time=pd.Timestamp(
                        2012, where.pop("month"), day, (8 + 3 * i) % 24, i % 60
                    ),
                    category_id=1,
                    **where,
                )
            )
    rows.append(dict(rows[0], user_id=-1, category="Nobody's Place"))
    return pd.DataFrame(rows)


def checkins(folder, table):
    @stage("poi.checkins", Made)
    def write(p, folder):
        table.to_parquet(folder / "checkins.parquet")

    write(Made(str(folder)))
    return str(folder)


@pytest.fixture
def made(tmp_path):
    return checkins(tmp_path / "checkins", city())


def user_of(body):
    return int(re.search(r"user (\d+) was at", body["messages"][0]["content"]).group(1))


def profile_of(body):
    return json.dumps(
        dict(
            GOOD, user_profile=f"User {user_of(body)} goes to POI {user_of(body)} every single day."
        )
    )


def command(*flags, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "recnb.poi.profiles", *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": KEY, **env},
        cwd=Path(__file__).parent.parent,
    )


def no_key(folder, *more):
    return not any(
        KEY in t
        for t in [
            *(
                f.read_bytes().decode("utf-8", "replace")
                for f in Path(folder).rglob("*")
                if f.is_file()
            ),
            *more,
        ]
    )


def test_statistics_see_train_alone_and_are_the_same_each_time(tmp_path, made):
    lines = (run(checkins=made, out=str(tmp_path / "a")) / "profiles.jsonl").read_bytes()
    assert [p["user_id"] for p in read_jsonl(tmp_path / "a" / "profiles.jsonl")] == list(range(6))
    table = city()
    moved = pd.concat(
        [table, table[table.split != "train"].assign(poi_id=5, category="Planted")],
        ignore_index=True,
    )
    for name, other in dict(
        planted=moved, alone=table[(table.split == "train") & (table.user_id >= 0)]
    ).items():
        there = checkins(tmp_path / name, other)
        assert (
            run(checkins=there, out=str(tmp_path / f"{name}_out")) / "profiles.jsonl"
        ).read_bytes() == lines
    assert (
        b"Secret" not in lines
        and b"Nobody" not in lines
        and b"99" not in lines
        and b"[/INST" not in lines
    )
    for p in read_jsonl(tmp_path / "a" / "profiles.jsonl"):
        assert (
            len(p["traits"]) == 5
            and list(p["attributes"]) == list(ATTRIBUTES)
            and p["preferences"]
            and p["routines"]
            and p["source"] == "statistics"
        )


@pytest.mark.parametrize("planted", ["test", "validation", "", None])
def test_a_planted_row_is_refused_not_described(planted):
    rows = city(1).query("split == 'train' and user_id == 0")
    rows = pd.concat([rows, rows.tail(1).assign(split=planted)])
    for build in (count_profile, write_question, profiles.describe_checkins):
        with pytest.raises(ValueError, match="train alone"):
            build(rows)


def test_requests_hold_every_train_row_and_no_other(tmp_path, made, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Rude(profile_of, rate=0)
    run(
        checkins=made,
        out=str(tmp_path / "p"),
        provider="server",
        base_url=server.url,
        concurrency=3,
    )
    table = city()
    for body in server.asked:
        words = body["messages"][0]["content"]
        own = table[table.user_id == user_of(body)]
        seen = re.findall(r"At (\S+ \S+), user", words)
        assert seen == [str(t) for t in own[own.split == "train"].local_time]
        assert (
            "Secret" not in words
            and "2012-06" not in words
            and "99" not in words
            and not re.search(r"\[/?INST|<<", words)
        )
    assert sorted(map(user_of, server.asked)) == list(range(6))


def test_places_without_a_category_still_make_a_profile(tmp_path):
    for n, empty in enumerate(["", None, float("nan"), "\u200b\n"]):
        made = read_jsonl(
            run(
                checkins=checkins(tmp_path / f"c{n}", city(2).assign(category=empty)),
                out=str(tmp_path / f"p{n}"),
            )
            / "profiles.jsonl"
        )
        assert (
            made[0]["preferences"] == ["place"]
            and "POI" in made[0]["user_profile"]
            and "nan" not in json.dumps(made).lower()
        )


def test_checkins_without_a_split_are_refused(tmp_path):
    table = city()
    there = checkins(tmp_path / "c", table.assign(split=""))
    with pytest.raises(BadInput, match="--trajectories"):
        run(checkins=there, out=str(tmp_path / "p"))

    @stage("poi.trajectories", Made)
    def write(p, folder):
        table.to_parquet(folder / "rows.parquet")

    write(Made(str(tmp_path / "t")))
    assert (
        run(checkins=there, out=str(tmp_path / "p"), trajectories=str(tmp_path / "t")).facts[
            "profiles"
        ]
        == 6
    )


def test_rude_server_still_gives_every_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    there = checkins(tmp_path / "c", city(120))
    server = Rude(profile_of, seed=1)
    done = run(
        checkins=there,
        out=str(tmp_path / "p"),
        provider="server",
        base_url=server.url,
        concurrency=24,
        timeout=2,
        request_attempts=12,
        backoff=0.01,
        answer_attempts=6,
        price_prompt=3.0,
        price_completion=5.0,
    )
    made = read_jsonl(done / "profiles.jsonl")
    assert [p["user_id"] for p in made] == list(range(120)) and not read_jsonl(
        done / "failures.jsonl"
    )
    for p in made:
        assert (
            p["user_profile"].startswith(f"User {p['user_id']} goes")
            and p["attributes"]["age"] == "adult"
            and p["raw"]["attributes"][0] == "Adult (18-64)"
        )
    usage = json.loads((done / "usage.json").read_text())
    assert (
        [usage["prompt_tokens"], usage["completion_tokens"]] == server.billed
        and usage["unmetered"] == server.unmetered
        and usage["lost"] == 0
    )
    assert usage["cost"] == pytest.approx(
        (3 * server.billed[0] + 5 * server.billed[1]) / 1e6, abs=1e-6
    )
    assert usage["errors"] and no_key(tmp_path)
    again = run(
        checkins=there,
        out=str(tmp_path / "r"),
        provider="replay",
        replay=str(done / "answers.jsonl"),
        answer_attempts=6,
    )
    assert [
        dict(p, source="server") for p in read_jsonl(again / "profiles.jsonl")
    ] == made and json.loads((again / "usage.json").read_text())["calls"] == 0


def test_a_profile_is_not_taken_from_the_reasoning_before_it(tmp_path, monkeypatch):
    "A draft before a closing tag; the axes in another order than they were asked for."
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    there = checkins(tmp_path / "c", city(3))

    def think_aloud(body):
        profile = json.loads(profile_of(body))
        draft = json.dumps(dict(profile, user_profile="DRAFT This person goes to many places."))
        attributes = dict(zip(ATTRIBUTES, profile["attributes"]))
        profile["attributes"] = dict(reversed(attributes.items()))
        return f"Draft: {draft} hmm better.\n</think>\n{json.dumps(profile)}"

    server = Rude(think_aloud, rate=0)
    done = run(checkins=there, out=str(tmp_path / "p"), provider="server", base_url=server.url)
    made = read_jsonl(done / "profiles.jsonl")
    assert len(made) == 3 and all(p["user_profile"].startswith("User") for p in made)
    assert all(p["attributes"]["age"] == "adult" for p in made)
    assert all(p["attributes"]["socioeconomic"] == "middle" for p in made)


def test_killed_run_goes_on_and_asks_nobody_twice(tmp_path):
    there = checkins(tmp_path / "c", city(40))
    server = Rude(profile_of, rate=0, answer_delay=0.1)
    flags = [
        "--checkins",
        there,
        "--out",
        tmp_path / "p",
        "--provider",
        "server",
        "--base_url",
        server.url,
        "--concurrency",
        3,
    ]
    known = []  # at each kill: users with an answer in the file, requests that the server had seen
    for stop in (8, 20):
        child = command(*flags)
        while server.answers < stop:
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert not (tmp_path / "p").exists()
        log = (tmp_path / "p.partial" / "answers.jsonl").read_bytes()
        time.sleep(0.3)  # what was under way reaches the server's list
        known.append(
            (
                {
                    json.loads(line)["id"]
                    for line in log.splitlines(True)
                    if line.endswith(b"\n") and b'"answer"' in line
                },
                len(server.asked),
            )
        )
    with open(tmp_path / "p.partial" / "answers.jsonl", "ab") as f:
        f.write(b'{"event": "answer", "id": 39, "te')  # a torn last line
    child = command(*flags)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    times = Counter(map(user_of, server.asked))
    for finished, asked in known:
        assert len(finished) >= 4 and not finished & set(map(user_of, server.asked[asked:]))
    assert set(times) == set(range(40))
    assert sum(times.values()) <= 40 + 2 * 3, "no more is lost than what was under way"
    whole = run(
        checkins=there,
        out=str(tmp_path / "w"),
        provider="replay",
        replay=str(tmp_path / "p" / "answers.jsonl"),
    )
    assert [dict(p, source="server") for p in read_jsonl(whole / "profiles.jsonl")] == read_jsonl(
        tmp_path / "p" / "profiles.jsonl"
    )
    assert json.loads((tmp_path / "p" / "usage.json").read_text())["lost"] == sum(
        times.values()
    ) - 40 and no_key(tmp_path, out, err)
    load_artifact(tmp_path / "p", "poi.profiles")


def test_failed_users_are_named_and_the_others_kept(tmp_path, made, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def moody(body):
        return (
            400
            if user_of(body) == 2
            else '{"traits": ["extroverted/introverted"]}'
            if user_of(body) == 4
            else profile_of(body)
        )

    done = run(
        checkins=made, out=str(tmp_path / "p"), provider="server", base_url=Rude(moody, rate=0).url
    )
    assert [p["user_id"] for p in read_jsonl(done / "profiles.jsonl")] == [0, 1, 3, 5]
    failed = {f["user_id"]: f["reason"] for f in read_jsonl(done / "failures.jsonl")}
    assert "HTTP 400" in failed[2] and "traits" in failed[4] and len(failed) == 2


def test_no_server_is_one_line_and_exit_code_2(tmp_path, made):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        child = command(
            "--checkins",
            made,
            "--out",
            tmp_path / "p",
            "--provider",
            "server",
            "--base_url",
            f"http://127.0.0.1:{s.getsockname()[1]}/v1",
            "--request_attempts",
            2,
            "--backoff",
            0.01,
        )
        out, err = child.communicate(timeout=60)
    assert (
        child.returncode == 2
        and err.count("\n") == 1
        and "connection failed" in err
        and "Traceback" not in err
        and not (tmp_path / "p").exists()
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--provider", "gpt"], "statistics"),
        (["--provider", "published"], "--source"),
        (["--provider", "replay"], "--replay"),
        (["--provider", "published", "--source", "none.parquet"], "no such file"),
        (["--provider", "server", "--base_url", "http://u:pw@h/v1"], "password"),
        (["--provider", "local", "--model_checkpoint", "/no/model"], "/no/model"),
        (["--provider", "replay", "--replay", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, made, flags, words, monkeypatch, capsys):
    from recnb import stages

    try:
        run(
            stages.parse_arguments(
                Params, ["--checkins", made, "--out", str(tmp_path / "p"), *flags]
            )
        )
    except BadInput as e:
        assert words in str(e) and "\n" not in str(e) and "pw" not in str(e)
    else:
        assert False, "must be refused"
    assert not (tmp_path / "p").exists()


def test_other_peoples_profiles_are_not_taken_silently(tmp_path, made):
    table = pd.DataFrame(
        [
            dict(
                dataset="nyc",
                user=u,
                profile_json=json.dumps(
                    dict(GOOD, user_profile=f"User {u} likes a walk in the park.")
                ),
            )
            for u in range(4)
        ]
        + [dict(dataset="nyc", user=4, profile_json="{}")]
    )
    table.to_parquet(tmp_path / "theirs.parquet")
    with pytest.raises(BadInput, match="--other_users"):
        run(
            checkins=made,
            out=str(tmp_path / "p"),
            provider="published",
            source=str(tmp_path / "theirs.parquet"),
        )
    done = run(
        checkins=made,
        out=str(tmp_path / "p"),
        provider="published",
        source=str(tmp_path / "theirs.parquet"),
        other_users=True,
    )
    assert done.facts["profiles"] == 4 and {
        f["user_id"]: f["reason"] for f in read_jsonl(done / "failures.jsonl")
    } == {4: "traits: Field required", 5: "no published profile"}


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=30)
    | st.integers()
    | st.floats()
    | st.sampled_from(["LOW_openness", "Older Adult (>64)", "18-64", "female/male"]),
    st.sampled_from([*TRAITS, *ATTRIBUTES]),
)
def test_any_value_becomes_a_word_of_its_axis(value, axis):
    words = {**TRAITS, **ATTRIBUTES}[axis]
    assert normalise_trait(value, axis) in (*words, "unknown")
    assert all(
        normalise_trait(change(w), axis) == w
        for w in words
        for change in (
            str,
            str.upper,
            str.title,
            " {} ".format,
            "{}\n".format,
            lambda w: w.replace(" ", "_"),
        )
    )


# users; % with the commonest traits (ignoring case; as written CA has 73); % with the commonest
# attributes, as written; distinct trait vectors, as written
FACTS = dict(nyc=(1047, 59, 65, 20), tky=(2281, 50, 67, 28), ca=(3956, 74, 62, 26))


@pytest.mark.parametrize("dataset", FACTS)
def test_published_profiles_have_their_known_counts(data, dataset):
    answers, failures = profiles.read_published_profiles(
        str(data / "genup/user_profiles.parquet"), dataset
    )
    assert (len(answers), failures) == (FACTS[dataset][0], {})
    written = [tuple(a["traits"]) for a in answers.values()]
    usual = sum(
        tuple(map(str.lower, w))
        == ("extroverted", "agreeable", "conscientious", "emotionally stable", "open")
        for w in written
    )
    people = sum(
        tuple(a["attributes"]) == ("adult", "male", "college & beyond", "middle")
        for a in answers.values()
    )
    assert (
        round(100 * usual / len(answers)),
        round(100 * people / len(answers)),
        len(set(written)),
    ) == FACTS[dataset][1:]
    lines = [profiles.build_profile_record(u, a, "published") for u, a in answers.items()]
    unknown = Counter(
        v for p in lines for v in (*p["traits"], *p["attributes"].values()) if v == "unknown"
    )
    assert unknown.total() <= 2 and all(p["raw"] == answers[p["user_id"]] for p in lines)
    assert sum(p["user_profile"] != answers[p["user_id"]]["user_profile"] for p in lines) <= 20, (
        "published text reaches the prompts as it was written"
    )


def test_local_provider_records_why_a_tiny_model_fails(tmp_path):
    there = checkins(tmp_path / "c", city(2))
    with pytest.raises(BadInput, match="no profile at all"):
        run(
            checkins=there,
            out=str(tmp_path / "p"),
            provider="local",
            model_checkpoint="tiny-llama",
            max_new_tokens=8,
            answer_attempts=2,
            max_checkins=3,
        )
    answers = [
        r
        for r in map(
            json.loads, (tmp_path / "p.partial" / "answers.jsonl").read_text().splitlines()
        )
        if r["event"] == "answer"
    ]
    assert len(answers) == 4 and all(r["completion_tokens"] <= 8 for r in answers)


SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("RECNB_SLOW"), reason="takes minutes: set RECNB_SLOW=1"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tiny-llama", pytest.param("smollm2-135m", marks=SLOW)])
def test_a_real_server_with_a_real_model(tmp_path, name):
    """`transformers serve`: requests, answers and counts go through.

    An answer is a valid profile or a failure with its reason. The tiny model has random weights, so
    each of its profiles must fail; SmolLM2 with 135 M parameters can answer a question.
    """
    pytest.importorskip("uvicorn")
    from recnb.llm import Recorder, Server, build_request, count_usage
    from recnb.models import load_model, locate_model

    try:
        model = locate_model(name)
    except BadInput as e:
        pytest.skip(str(e))
    if name == "tiny-llama":
        for part in load_model(name):
            part.save_pretrained(model := str(tmp_path / "model"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            model,
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        stdout=open(tmp_path / "serve.log", "w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 300
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert serve.poll() is None and time.monotonic() < end, (
                tmp_path / "serve.log"
            ).read_text()[-2000:]
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        store = Recorder(tmp_path / "a.jsonl", Server(url, timeout=300))
        said = store(
            build_request(
                "What is the capital of France? Answer in one short sentence.",
                model,
                temperature=0.0,
                max_tokens=16,
            )
        )
        assert (
            said["prompt_tokens"] > 10
            and 0 < said["completion_tokens"] <= 17
            and ("Paris" in said["text"] or name == "tiny-llama")
        )
        there = checkins(tmp_path / "c", city(2))
        p = Params(
            checkins=there,
            out=str(tmp_path / "p"),
            provider="server",
            model_checkpoint=model,
            base_url=url,
            timeout=300,
            temperature=0.0,
            answer_attempts=2,
            concurrency=1,
            max_new_tokens=40 if name == "tiny-llama" else 250,
            max_checkins=4,
        )
        try:
            made = [
                *read_jsonl(run(p) / "profiles.jsonl"),
                *read_jsonl(tmp_path / "p" / "failures.jsonl"),
            ]
        except BadInput as e:
            assert "no profile at all; the first reason: " in str(e)
            made = []
        events = read_jsonl((tmp_path / "p" if made else tmp_path / "p.partial") / "answers.jsonl")
        counts = count_usage(events)
        print(
            json.dumps(counts),
            *[e["text"] for e in events if e["event"] == "answer"],
            made,
            sep="\n",
        )
        assert (
            2 <= counts["answers"] <= 4
            and not counts["errors"]
            and counts["unmetered"] == counts["lost"] == 0
            and counts["prompt_tokens"] > 500
        )
        assert all(p.get("reason") or build_profile_schema().model_validate(p["raw"]) for p in made)
    finally:
        os.killpg(serve.pid, signal.SIGTERM)
        serve.wait(60)
