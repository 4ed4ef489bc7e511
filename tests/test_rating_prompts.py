"Rating prompts and the warm start: no label in them, tags read strictly, killed runs."

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb import models
from recnb.artifacts import sha256
from recnb.launch import flags
from recnb.rating import prompts, reviews, sketch, warm_start
from recnb.rating.prompts import EMPTY, chat, digit_ids, fit, open_prompts, read_answer, well_formed
from recnb.stages import BadInput, make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("p")
    R = reviews.run(
        make(
            reviews.Params, dict(dataset="made", users=20, items=40, seed=5, out=str(d / "reviews"))
        )
    )
    S = sketch.run(
        make(sketch.Params, dict(reviews=str(R.path), n_clusters=5, top_k=8, out=str(d / "sketch")))
    )
    return (
        R,
        S,
        prompts.run(prompts.Params(str(R.path), str(d / "prompts"), str(S.path), max_history=4)),
        d,
    )


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_a_rating_is_a_plain_number_or_nothing(text):
    x = read_answer(f"<think>\n</think>\n<answer>{text}</answer>")
    assert x is None or (1 <= x <= 5 and float(text.split(">")[-1]) == x)


def test_smollm2_answers_in_one_token():
    from transformers import AutoTokenizer

    try:
        t = AutoTokenizer.from_pretrained(models.locate("smollm2-135m"))
    except BadInput as e:
        pytest.skip(str(e))
    assert [t.decode([i]) for i in digit_ids(t, chat(t, "s", "p") + EMPTY)] == list("12345")
    assert chat(t, "s", "p").rstrip().endswith("assistant")


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
        make(prompts.Params, dict(reviews="r", out="o", use_long_history="maybe"))
    with pytest.raises(BadInput, match="as_shipped"):
        prompts.run(prompts.Params(str(R.path), str(d / "x"), str(S.path), rule="as_shipped"))


def test_no_prompt_names_the_rating_of_its_candidate(made):
    R, S, P, _ = made
    df = pd.read_parquet(R / "interactions.parquet")
    for t in open_prompts(P.path)[1].values():
        for r in t.itertuples():
            recent, _, asked = r.prompt.partition("to rate: ")
            assert (
                f"{df.title[r.row_id]}, {df.categories[r.row_id]}, " not in recent
                and not asked.split("\n")[0][-1].isdigit()
            )


def test_fit_keeps_the_question(made):
    t = models.load("tiny-llama", device="cpu")[1]
    system, tables = open_prompts(made[2].path)
    text = tables["test"].prompt.iloc[0]
    short, cut = fit(t, system, text, len(t.encode(chat(t, system, text))) - 20)
    assert cut and short.split("\n")[-2:] == text.split("\n")[-2:] and len(short) < len(text)
    with pytest.raises(BadInput):
        fit(t, system, text, 10)


def params(made, out, **kw):
    return warm_start.Params(
        "tiny-qwen",
        str(made[2].path),
        str(out),
        **{**dict(train_rows=24, batch_size=4, num_epochs=3, save_steps=3, dtype="float32"), **kw},
    )


def test_warm_start_never_reads_a_label(made, tmp_path):
    t = models.load("tiny-qwen", device="cpu")[1]
    texts, said = warm_start.pairs(params(made, tmp_path / "w"), t)
    assert all(well_formed(s) for s in said)
    for text, s in zip(texts, said):
        assert read_answer(s) in {
            r for _, r in warm_start.shown(text)
        }  # one of the ratings that the prompt shows
    labels = open_prompts(made[2].path)[1]["train"].label
    assert 0 < sum(read_answer(s) == y for s, y in zip(said, labels)) < len(said)


def test_warm_start_killed_ends_with_the_same_bytes(made, tmp_path):
    def files(a):
        return {f.name: sha256(f) for f in sorted((a / "model").iterdir())}

    whole = files(warm_start.run(params(made, tmp_path / "whole")).path)
    cmd = [
        sys.executable,
        "-m",
        "recnb.rating.warm_start",
        *flags(params(made, tmp_path / "killed")),
    ]
    p = subprocess.Popen(
        cmd, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(1200):
        if (
            list((tmp_path / "killed.partial").glob("checkpoints/checkpoint-3"))
            or p.poll() is not None
        ):
            break
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert files(warm_start.run(params(made, tmp_path / "killed")).path) == whole
