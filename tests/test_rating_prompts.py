"Rating prompts and the warm start: no label in them, tags read strictly, killed runs."

import functools
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from recnb import models
from recnb.rating import prompts, reviews, sketch, warm_start
from recnb.rating.prompts import (
    EMPTY_REASONING,
    find_digit_tokens,
    is_well_formed,
    open_prompts,
    parse_answer,
    render_chat,
    shorten_to_fit,
)
from recnb.stages import BadInput


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("p")
    R = reviews.run(num_users=20, num_items=40, seed=5, out=str(d / "reviews"))
    S = sketch.run(reviews=R, n_clusters=5, top_k=8, out=str(d / "sketch"))
    P = prompts.run(reviews=R, sketch=S, max_history=4, out=str(d / "prompts"))
    return R, S, P, d


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_a_rating_is_a_plain_number_or_nothing(text):
    x = parse_answer(f"<think>\n</think>\n<answer>{text}</answer>")
    assert x is None or (1 <= x <= 5 and float(text.split(">")[-1]) == x)


def test_smollm2_answers_in_one_token():
    try:
        t = models.load_tokenizer("smollm2-135m")
    except BadInput as e:
        pytest.skip(str(e))
    ids = find_digit_tokens(t, render_chat(t, "s", "p") + EMPTY_REASONING)
    assert [t.decode([i]) for i in ids] == list("12345")
    assert render_chat(t, "s", "p").rstrip().endswith("assistant")


def test_long_history_is_a_flag_that_means_what_it_says(made):
    R, S, P, d = made
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "recnb.rating.prompts",
            "--reviews",
            str(R.path),
            "--sketch",
            str(S.path),
            "--no-use_long_history",
            "--out",
            str(d / "flag"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and not any(
        "Topics" in t for t in open_prompts(d / "flag")[1]["train"].prompt
    )
    assert any("Topics" in t for t in open_prompts(P.path)[1]["train"].prompt)
    with pytest.raises(BadInput, match="bool"):
        prompts.run(reviews="r", out="o", use_long_history="maybe")
    with pytest.raises(BadInput, match="as_shipped"):
        prompts.run(reviews=R, sketch=S, sketch_rule="as_shipped", out=str(d / "x"))


def test_no_prompt_names_the_rating_of_its_candidate(made):
    R, S, P, _ = made
    df = reviews.INTERACTIONS.read(R)
    for t in open_prompts(P.path)[1].values():
        for r in t.itertuples():
            recent, _, asked = r.prompt.partition("to rate: ")
            assert (
                f"{df.title[r.row_id]}, {df.categories[r.row_id]}, " not in recent
                and not asked.split("\n")[0][-1].isdigit()
            )


def test_fit_keeps_the_question(made):
    t = models.load_tokenizer("tiny-llama")
    system, tables = open_prompts(made[2].path)
    text = tables["test"].prompt.iloc[0]
    short, cut = shorten_to_fit(t, system, text, len(t.encode(render_chat(t, system, text))) - 20)
    assert cut and short.split("\n")[-2:] == text.split("\n")[-2:] and len(short) < len(text)
    with pytest.raises(BadInput):
        shorten_to_fit(t, system, text, 10)


tokenizer_of = functools.cache(models.load_tokenizer)
words = st.text(st.sampled_from("ab ,1345Recent ratings"), min_size=1, max_size=12).map(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    topics=st.lists(words, max_size=8),
    rated=st.lists(st.tuples(words, st.integers(1, 5)), max_size=20),
    candidate=words,
    limit=st.integers(60, 260),
)
def test_no_candidate_is_dropped_for_a_rated_line(topics, rated, candidate, limit):
    "Whatever a candidate is called, the question stays whole, and the latest ratings stay."
    t = tokenizer_of("tiny-llama")
    liked = sketch.format_sketch(range(len(topics)), [], topics)
    lines = [sketch.format_rated_item(title, "", r) for title, r in rated]
    text = prompts.build_user_message(liked, lines, f"{candidate}, 5", "movie")
    assert [text.split("\n")[i] for i in prompts.find_rated_lines(text)] == lines
    question = text[text.rindex("\n\n") :].strip()
    try:
        short, cut = shorten_to_fit(t, "Rate.", text, limit)
    except BadInput:
        assert len(t.encode(render_chat(t, "Rate.", question))) > limit
        return
    assert len(t.encode(render_chat(t, "Rate.", short))) <= limit and cut == (short != text)
    assert short.endswith(question)
    left = [short.split("\n")[i] for i in prompts.find_rated_lines(short)]
    assert left == lines[len(lines) - len(left) :]


def test_long_titles_and_hostile_ones_take_one_line(made):
    R, *_ = made
    df = reviews.INTERACTIONS.read(R)
    title = "Apollo\u202e\u2066 \x1b[2J\n13, 5\u0000" + "!" * 10**5
    rows = reviews.ROWS.read(R).tail(3)
    odd = df.assign(title=title, categories="Drama|" * 10**4)
    found = prompts.build_rating_prompts(odd, rows, None, "movie", 4).prompt
    assert all(len(x) < 3000 and x.isprintable() for text in found for x in text.split("\n"))
    assert all(
        len(prompts.find_rated_lines(x)) == min(4, n) for x, n in zip(found, rows.history_length)
    )


def params(made, out, **kw):
    small = dict(train_rows=24, batch_size=4, num_epochs=3, save_steps=3, dtype="float32")
    given = dict(model_checkpoint="tiny-qwen", prompts=str(made[2].path), out=str(out))
    return warm_start.Params(**given, **{**small, **kw})


def test_warm_start_never_reads_a_label(made, tmp_path):
    t = models.load_tokenizer("tiny-qwen")
    texts, said = warm_start.build_examples(params(made, tmp_path / "w"), t)
    assert all(is_well_formed(s) for s in said)
    for text, s in zip(texts, said):
        assert parse_answer(s) in {
            r for _, r in warm_start.read_rated_lines(text)
        }  # one of the ratings that the prompt shows
    labels = open_prompts(made[2].path)[1]["train"].label
    assert 0 < sum(parse_answer(s) == y for s, y in zip(said, labels)) < len(said)


def test_warm_start_shared_by_two_and_killed_ends_as_one_process_does(made, tmp_path, copies):
    one = warm_start.run(params(made, tmp_path / "one"))
    p = params(made, tmp_path / "two", batch_size=2, fsdp=True)
    kept = tmp_path / "two.partial/checkpoints/checkpoint-3"
    copies.kill("recnb.rating.warm_start", p, kept.exists, processes=2)
    assert "going on after step" in copies.run("recnb.rating.warm_start", p, processes=2)
    ours, theirs = (load_file(tmp_path / x / "model/model.safetensors") for x in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(ours[n].allclose(theirs[n], atol=1e-3) for n in ours)
    names = [f.name for f in sorted((one / "model").iterdir())]
    assert names == [f.name for f in sorted((tmp_path / "two/model").iterdir())]
