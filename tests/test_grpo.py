"GRPO: published rewards, groups, the reference, selection on validation rows, killed runs."

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from processes import count_lines

from recnb import models
from recnb.artifacts import hash_file, load_artifact, stage, write_json, write_parquet
from recnb.rating import grpo
from recnb.rating.prompts import TAGS, render_chat, render_prompts
from recnb.stages import BadInput, make_params

timings = {"seconds", "tokens_per_s", "memory_mib"}
system = "You rate movies. Reason inside <think></think>, then answer inside <answer></answer>."


@dataclass
class Made:
    out: str


@stage("rating.prompts", Made)
def make(p, folder):
    rng = np.random.default_rng(0)
    for split, n in dict(train=24, validation=6, test=2).items():
        label = rng.choice([1.0, 2, 3, 4, 5], n)
        text = [
            f"Recent ratings:\nFilm {i}, {y:g}\nFilm {i + 1}, 4\n\n"
            f"How will the user rate Film {i + 2}?"
            for i, y in enumerate(label)
        ]
        write_parquet(
            pd.DataFrame(
                dict(row_id=range(n), user_id="u", prompt=text, label=label, history_length=2)
            ),
            folder / f"{split}.parquet",
        )
    write_json(
        dict(system=system, domain="movie", sketch_rule="none", leaky=False),
        folder / "prompts.json",
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    known = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)
    if known is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return str(make(Made(str(tmp_path_factory.mktemp("grpo") / "prompts"))).path)


@pytest.fixture(scope="module")
def taught(prompts, tmp_path_factory):
    "A tiny model that has seen the form of an answer; its ratings mean nothing."
    import torch

    from recnb.training import compute_answer_loss, encode_pairs

    out = tmp_path_factory.mktemp("grpo") / "taught"
    model, tokenizer = models.load_model("tiny-qwen", device="cpu")
    texts = [
        render_chat(tokenizer, system, t)
        for t in pd.read_parquet(f"{prompts}/train.parquet").prompt
    ]
    rng = np.random.default_rng(0)
    steps = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        ids, labels = encode_pairs(
            tokenizer,
            list(rng.choice(texts, 8)),
            [
                f"<think>\nok\n</think>\n\n<answer>{v}</answer><|im_end|>"
                for v in rng.integers(1, 6, 8)
            ],
        )
        width = max(map(len, ids))
        loss = compute_answer_loss(
            model,
            torch.tensor([r + [0] * (width - len(r)) for r in ids]),
            torch.tensor([r + [-100] * (width - len(r)) for r in labels]),
        )[0]
        loss.backward()
        steps.step()
        steps.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


small = dict(
    keep_untrained=False,  # what training made is looked at, be it better or not
    num_generations=4,
    prompts_per_step=2,
    batch_size=4,
    generation_batch_size=8,
    max_new_tokens=40,
    max_prompt_length=600,
    learning_rate=1e-2,
    eval_steps=3,
    save_steps=2,
    max_steps=6,
    dtype="float32",
)


def params(prompts, model, out, **kw):
    given = dict(model_checkpoint=model, prompts=prompts, out=str(out))
    return make_params(grpo.Params, {**given, **small, **kw})


def lines(out):
    return [
        {k: v for k, v in json.loads(line).items() if k not in timings}
        for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ]


def written(out):
    return {
        f.relative_to(out).as_posix(): hash_file(f)
        for f in sorted(Path(out).rglob("*"))
        if f.is_file() and f.name not in ("metrics.jsonl", "manifest.json")
    }


@pytest.fixture(scope="module")
def undisturbed(prompts, taught, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "undisturbed"
    grpo.run(params(prompts, taught, out))
    return out


def published(text, g):
    "The published rule, for answers whose number is a rating."
    at = [text.find(t) for t in TAGS]
    form = 1 if all(text.count(t) == 1 for t in TAGS) and at == sorted(at) else -1
    inside = re.findall("<answer>(.*?)</answer>", text, re.S)
    try:
        return form, 2 - abs(min(5, max(1, float(inside[-1]))) - g)
    except (IndexError, ValueError):
        return form, -2


def test_rewards_are_the_published_ones_for_ratings():
    rng, pieces, seen = (
        np.random.default_rng(0),
        [*TAGS, *TAGS, "4", "2.5", "\n", "ok", "1", "5"],
        set(),
    )
    texts = ["".join(rng.choice(pieces, rng.integers(0, 9))) for _ in range(3000)]
    texts += [
        f"<think>x</think><answer>{v}</answer>" for v in ("1", "3.0", " 4 ", "2.5", "four", "")
    ]
    for t in texts:
        inside = re.findall("<answer>(.*?)</answer>", t, re.S)
        if (
            inside
            and re.fullmatch(r"[\d.]+", inside[-1].strip())
            and not re.fullmatch(r"[1-5]|2\.5|3\.0", inside[-1].strip())
        ):
            continue  # 44, 2.55: see below
        g = float(rng.integers(1, 6))
        assert (grpo.reward_form(t), grpo.reward_content(t, g)) == published(t, g), t
        seen.add(published(t, g)[0])
        seen.add(("read", published(t, g)[1] > -2))
    assert seen == {1, -1, ("read", True), ("read", False)}


@pytest.mark.parametrize(
    "value",
    [
        "nan",
        "NaN",
        "inf",
        "-inf",
        "7",
        "0",
        "0.99",
        "5.01",
        "-3",
        "1e0",
        "1_0",
        "٣",
        "4 5",
        "4/5",
        "<b>4</b>",
    ],
)
def test_what_is_no_rating_earns_minus_two(value):
    text = f"<think>x</think><answer>{value}</answer>"
    assert (
        grpo.reward_content(text, 5) == grpo.reward_content(text, 1) == -2
        and grpo.reward_form(text) == 1
    )
    assert grpo.score_answers([text], [5])["score"] == 2 and grpo.score_answers([text], [5])[
        "histogram"
    ] == [
        0,
        0,
        0,
        0,
        0,
        1,
    ]


def test_the_log_adds_up(undisturbed, prompts):
    a = load_artifact(undisturbed, "rating.grpo")
    log = lines(undisturbed)
    assert (
        len(log) == a.facts["steps"] == 6
        and not (undisturbed / "checkpoints").exists()
        and a.facts["loss_type"] == "dapo"
    )
    for r in log:
        assert sum(r["histogram"]) == 8 and r["reward"] == pytest.approx(
            r["reward_form"] + r["reward_content"]
        )
        readable = 1 - r["histogram"][-1] / 8  # content = readable · (2 − MAE) − 2 · unreadable
        assert r["reward_content"] == pytest.approx(
            readable * (2 - (r["mae"] or 0)) - 2 * (1 - readable), abs=1e-5
        )
        assert (
            r["form"] == pytest.approx((1 + r["reward_form"]) / 2)
            and 0 < r["completion_length"] <= 40
            and r["learning_rate"] == 1e-2
        )
    assert log[0]["kl"] == 0 and all(
        r["kl"] > 0 for r in log[1:]
    )  # the reference is the model at the start
    assert any(sum(r["histogram"][:5]) for r in log) and any(0 < r["reward_std"] for r in log)
    assert len(grpo.plot_rewards(log).axes) == 6


def test_selection_is_on_validation_rows(undisturbed, prompts, taught):
    a, validation = (
        load_artifact(undisturbed),
        [json.loads(line) for line in (undisturbed / "validation.jsonl").read_text().splitlines()],
    )
    assert [r["step"] for r in validation] == [0, 3, 6] and all(
        sum(r["histogram"]) == 6 for r in validation
    )
    assert a.facts["validation_score"] == min(r["score"] for r in validation[1:]) and a.facts[
        "best_step"
    ] in (3, 6)
    df = pd.read_parquet(
        f"{prompts}/validation.parquet"
    )  # the weights that were kept do what validation.jsonl says of their step
    model, tokenizer = models.load_trained_model(
        taught, str(undisturbed), device="cpu", dtype="float32"
    )
    found = grpo.make_grpo_judge(
        tokenizer, [render_chat(tokenizer, system, t) for t in df.prompt], df.label.tolist(), 40
    )(model)
    assert found["score"] == pytest.approx(a.facts["validation_score"])


def test_killed_with_9_and_started_again(prompts, taught, undisturbed, tmp_path, capsys, copies):
    p, log = params(prompts, taught, tmp_path / "x"), tmp_path / "x.partial/metrics.jsonl"
    copies.kill("recnb.rating.grpo", p, lambda: count_lines(log) >= 3)
    grpo.run(p)
    assert "going on after step" in capsys.readouterr().err
    assert written(tmp_path / "x") == written(undisturbed) and lines(tmp_path / "x") == lines(
        undisturbed
    )


def test_stopped_between_the_last_step_and_the_end(
    prompts, taught, undisturbed, tmp_path, monkeypatch
):
    from transformers import Trainer

    original = Trainer._maybe_log_save_evaluate

    class Stop(Exception):
        pass

    def stopping(self, *a, **kw):
        original(self, *a, **kw)
        if self.state.global_step == 6:
            raise Stop

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", stopping)
    p = params(prompts, taught, tmp_path / "x")
    with pytest.raises(Stop):
        grpo.run(p)
    monkeypatch.undo()
    grpo.run(p)
    assert written(tmp_path / "x") == written(undisturbed) and lines(tmp_path / "x") == lines(
        undisturbed
    )


def test_two_processes_with_copies_and_with_shares(prompts, taught, tmp_path, copies):
    ways = dict(copies={}, shares=dict(fsdp=True), full=dict(fsdp=True, tuning="full", max_steps=1))
    for name, way in ways.items():
        p = params(prompts, taught, tmp_path / name, **{"max_steps": 2, **way})
        copies.run("recnb.rating.grpo", p, processes=2)
    copied, shared, full = (lines(tmp_path / name) for name in ways)
    assert [sum(r["histogram"]) for r in copied] == [16] * 2
    assert copied[0]["kl"] == pytest.approx(0, abs=1e-6) and copied[1]["kl"] > 0
    assert load_artifact(tmp_path / "copies").manifest["processes"] == 2
    for ours, theirs in zip(shared, copied, strict=True):
        assert ours["histogram"] == theirs["histogram"]
        for name in theirs.keys() - {"histogram"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for name in ("histogram", "reward", "entropy", "kl"):  # before the first step all are one
        assert full[0][name] == pytest.approx(copied[0][name], rel=1e-4, abs=1e-6), name
    for name in ("copies", "shares"):
        looks = (tmp_path / name / "validation.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in looks] == [0, 2]


def test_tags_as_tokens_and_all_weights(prompts, taught, tmp_path):
    a = grpo.run(
        params(
            prompts,
            taught,
            tmp_path / "x",
            tuning="full",
            tag_tokens=True,
            share_prompts=False,  # the plain way, by TRL alone
            learning_rate=1e-4,
            max_steps=2,
            temperature=0.5,
        )
    )
    model, tokenizer = models.load_model(str(a / "model"), device="cpu")
    assert all(len(tokenizer.encode(t)) == 1 for t in TAGS) and len(
        model.get_input_embeddings().weight
    ) >= len(tokenizer)
    log = lines(tmp_path / "x")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[1]["kl"] > 0
    assert not [f for f in (tmp_path / "x").rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]


def test_a_step_is_the_same_whatever_its_passes(prompts, taught, tmp_path):
    common = dict(max_steps=1, learning_rate=1e-3, validation_rows=1, beta=0.1)
    for size in (2, 8):
        grpo.run(params(prompts, taught, tmp_path / str(size), batch_size=size, **common))
    a = lines(tmp_path / "2")[0]
    b = lines(tmp_path / "8")[0]
    assert a["histogram"] == b["histogram"] and [a["loss"], a["grad_norm"]] == pytest.approx(
        [b["loss"], b["grad_norm"]], rel=1e-3, abs=1e-6
    )


def test_four_bit_weights_survive_being_judged(prompts, taught, tmp_path):
    "On CPUs with bfloat16 instructions a look in eval mode once shrank every later gradient."
    norm = {}
    for tuning in ("lora", "qlora"):
        grpo.run(
            params(
                prompts, taught, tmp_path / tuning, tuning=tuning, max_steps=1, validation_rows=1
            )
        )
        norm[tuning] = lines(tmp_path / tuning)[0]
    assert norm["lora"]["histogram"] == norm["qlora"]["histogram"] and norm["qlora"][
        "grad_norm"
    ] == pytest.approx(norm["lora"]["grad_norm"], rel=0.3)


def test_long_prompts_are_cut_and_counted(prompts, taught):
    model, tokenizer = models.load_model(taught, device="cpu")
    old = "\n".join(f"Film {i}, 3" for i in range(200))
    df = pd.DataFrame(
        dict(
            row_id=[0, 1],
            prompt=[
                f"Recent ratings:\n{old}\n\nHow will the user rate Film 7?",
                "How will the user rate Film 7?",
            ],
            label=[3.0, 4.0],
        )
    )
    found = render_prompts(df, system, tokenizer, 300)
    assert found.cut.sum() == 1 and found.length.max() <= 300
    assert all("rate Film 7?" in t for t in found.text)


def test_reasons_to_refuse(prompts, taught, tmp_path, copies):
    for change, message in [
        (dict(num_generations=1), "num_generations"),
        (dict(batch_size=3), "divisor"),
        (dict(tag_tokens=True), "--tuning full"),
        (dict(model_checkpoint="tiny-quen"), "tiny-quen"),
        (dict(max_prompt_length=5000), "positions for 4096"),
        (dict(target_modules=["query"]), "query"),
        (dict(beta=-1.0), "beta"),
    ]:
        with pytest.raises(BadInput, match=re.escape(message)):
            grpo.run(params(prompts, taught, tmp_path / "x", **change))
    said = copies.refuse("recnb.rating.grpo", params(prompts, taught, tmp_path / "x", batch_size=3))
    assert said.startswith("grpo: ") and "divisor" in said and said.count("\n") == 1
