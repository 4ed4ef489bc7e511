"The reasoning stage as a user meets it: shared work, kills, the states of the model's own tokens, bad input."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

import recnb.rating.reasoning as reasoning
from recnb import models
from recnb.artifacts import stage, write_json, write_parquet
from recnb.rating.prompts import chat, open_prompts, read_answer
from recnb.stages import BadInput, Folder, Source

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
FORM = "<think>\nThe user {}\n</think>\n\n<answer>{}</answer>"


@dataclass
class Made:
    out: str
    train: int = 24


@stage("rating.prompts", Made)
def prompts(p, folder):
    rng, row = random.Random(0), 100
    for split, n in dict(train=p.train, valid=8, test=14).items():
        rows = []
        for _ in range(n):
            ratings = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
            rows.append(
                dict(
                    row_id=(row := row + 3),
                    user_id=f"u{row % 7}",
                    prompt="".join(f"Film {r}, é, {r}\n" for r in ratings) + "Next?",
                    label=float(rng.randint(1, 5)),
                    history_length=len(ratings),
                )
            )
        rng.shuffle(rows)
        write_parquet(pd.DataFrame(rows), folder / f"{split}.parquet")
    write_json(
        dict(
            system="Which rating, from 1.0 to 5.0? First <think>why</think>, then <answer>the rating</answer>.",
            domain="movie",
            rule="count",
            leaky=False,
        ),
        folder / "prompts.json",
    )


def teach(d, steps=110):
    "A tiny model that has seen the form of an answer, in a folder."
    model, tokenizer = models.load("tiny-qwen")
    system, tables = open_prompts(d / "prompts")
    contexts, rng = (
        [tokenizer.encode(chat(tokenizer, system, x)) for x in tables["train"].prompt[:20]],
        random.Random(0),
    )
    step = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(steps):
        said = [
            FORM.format(
                rng.choice(["likes it", "may like this", "will not like it"]), rng.choice("12345")
            )
            + tokenizer.eos_token
            for _ in range(8)
        ]
        rows = [(rng.choice(contexts), tokenizer.encode(s)) for s in said]
        n = max(len(a + b) for a, b in rows)
        ids = torch.tensor([a + b + [tokenizer.pad_token_id] * (n - len(a + b)) for a, b in rows])
        labels = torch.tensor([[-100] * len(a) + b + [-100] * (n - len(a + b)) for a, b in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        step.step(), step.zero_grad()
    model.save_pretrained(d / "model"), tokenizer.save_pretrained(d / "model")


@dataclass
class Adapted:
    model_checkpoint: Source
    out: str
    grpo: Folder = ""
    size: float = 0.3


def adapter(p, folder):
    model = models.lora(models.assemble(p.model_checkpoint, p.grpo)[0])
    for name, w in model.named_parameters():
        w.data += p.size * ("lora_B" in name)
    model.save_pretrained(folder / "adapter")


grpo, alignment = (
    stage("rating.grpo", Adapted)(adapter),
    stage("rating.alignment", Adapted)(adapter),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d, n = tmp_path_factory.mktemp("rating"), torch.get_num_threads()
    torch.set_num_threads(1)
    prompts(Made(f"{d}/prompts")), teach(d)
    yield d
    torch.set_num_threads(n)


def params(d, **kw):
    return reasoning.Params(
        **dict(
            prompts=f"{d}/prompts",
            model_checkpoint=f"{d}/model",
            out=f"{d}/out",
            max_completion_length=50,
            batch_size=5,
        )
        | kw
    )


def run(d, **kw):
    return reasoning.run(params(d, **kw)).path


def files(folder):
    return {
        f: (Path(folder) / f).read_bytes()
        for f in ("rationales.parquet", "teacher_states.safetensors")
    }


@pytest.fixture(scope="module")
def alone(made):
    return run(made, out=f"{made}/alone")


@pytest.fixture(scope="module")
def drawn(made):
    return run(made, out=f"{made}/drawn", temperature=1.0)


def flags(d, out):
    return [
        "--prompts",
        f"{d}/prompts",
        "--model_checkpoint",
        f"{d}/model",
        "--out",
        f"{d}/{out}",
        "--max_completion_length",
        "50",
        "--batch_size",
        "5",
    ]


def test_rationales(made, drawn):
    t, prompts_ = (
        pd.read_parquet(drawn / "rationales.parquet"),
        open_prompts(made / "prompts")[1]["train"].set_index("row_id"),
    )
    tokenizer = models.assemble(f"{made}/model")[1]
    assert t.columns.tolist() == [
        "row_id",
        "token_ids",
        "text",
        "predicted",
        "correct",
        "answer_at",
        "tokens",
    ]
    assert (
        t.row_id.tolist() == sorted(prompts_.index) and not prompts_.index.is_monotonic_increasing
    )
    for r in t.itertuples():
        ids, answer = r.token_ids.tolist(), read_answer(r.text)
        assert (
            tokenizer.decode(ids) == r.text
            and r.tokens == len(ids) <= 50
            and tokenizer.eos_token_id not in ids
        )
        assert "</answer>" not in tokenizer.decode(ids[:-1])
        assert r.predicted == answer or (answer is None and pd.isna(r.predicted))
        assert r.correct == (answer == prompts_.label[r.row_id])
        if r.answer_at >= 0:
            assert tokenizer.decode(ids[: r.answer_at + 1]).endswith(
                "<answer>"
            ) and r.text.endswith("</answer>")
    facts = json.loads((drawn / "manifest.json").read_text())["facts"]
    assert facts["n"] == 24 == facts["unreadable"] + t.predicted.notna().sum() and facts[
        "correct"
    ] == round(t.correct.mean(), 4)
    assert (
        t.predicted.nunique() > 1
        and t.correct.any()
        and not t.correct.all()
        and sum(facts["labels_where_correct"].values()) == t.correct.sum()
    )


def test_states_are_those_of_the_own_tokens_one_by_one(made, drawn):
    model, tokenizer = models.assemble(f"{made}/model")
    system, tables = open_prompts(made / "prompts")
    t, (ids, states) = (
        pd.read_parquet(drawn / "rationales.parquet").set_index("row_id"),
        reasoning.open_states(drawn),
    )
    assert (
        ids.dtype == torch.int64
        and ids.tolist() == t.index[t.answer_at >= 0].tolist()
        and len(ids) > 10
        and states.shape[1:] == (3, 64)
    )
    text = tables["train"].set_index("row_id").prompt
    for i, r in enumerate(ids.tolist()):
        tokens = (
            tokenizer.encode(chat(tokenizer, system, text[r]))
            + t.token_ids[r][: t.answer_at[r] + 1].tolist()
        )
        with torch.inference_mode():
            plain = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        assert torch.allclose(states[i], torch.stack([h[0, -1] for h in plain]), atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_greedy_is_greedy_whatever_is_beside_it(name):
    model, tokenizer = models.load(name)
    texts = ["Rated 5.", "Rated 1, 2, 3, 4, 5, 1, 2, 3, 4, 5.", "é"]
    for text, found in zip(texts, reasoning.reason(model, tokenizer, texts, 12)):
        ids = tokenizer.encode(text)
        for token in found:
            with torch.inference_mode():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert len(found) == 12


def test_seeds(made, drawn):
    assert files(run(made, out=f"{made}/again", temperature=1.0, train_rows=24)) == files(drawn)
    assert files(run(made, out=f"{made}/other", temperature=1.0, seed=1)) != files(drawn)
    some = [
        pd.read_parquet(
            run(made, out=f"{made}/some{s}", train_rows=6, seed=s, max_completion_length=2)
            / "rationales.parquet"
        ).row_id.tolist()
        for s in (1, 2)
    ]
    assert some[0] != some[1] and len(set(some[0])) == len(set(some[1])) == 6


def test_two_processes_write_the_same_bytes(made, alone):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "recnb.rating.reasoning",
            *flags(made, "shared"),
        ],
        env=ENV,
        check=True,
        timeout=180,
        cwd=made,
    )
    assert files(made / "shared") == files(alone)
    assert json.loads((made / "shared/manifest.json").read_text())["processes"] == 2


def test_killed_and_taken_up(made, tmp_path, monkeypatch):
    prompts(Made(f"{tmp_path}/prompts", train=240))
    own = [*flags(tmp_path, "out"), "--model_checkpoint", f"{made}/model"]
    process = subprocess.Popen(
        [sys.executable, "-m", "recnb.rating.reasoning", *own],
        env=ENV,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    started = time.time()
    while not list(tmp_path.glob("out.partial/parts/*.jsonl")) and time.time() - started < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        not (tmp_path / "out").exists()
        and 0 < (done := len(list(tmp_path.glob("out.partial/parts/*.jsonl")))) < 48
    )
    calls, reason = [], reasoning.reason
    monkeypatch.setattr(reasoning, "reason", lambda *a: calls.append(1) or reason(*a))
    kw = dict(prompts=f"{tmp_path}/prompts", model_checkpoint=f"{made}/model")
    after = files(run(tmp_path, **kw))
    assert len(calls) == 48 - done
    assert files(run(tmp_path, out=f"{tmp_path}/again", **kw)) == after


def test_adapter_counts_and_must_fit(made, alone):
    grpo(Adapted(f"{made}/model", f"{made}/grpo"))
    assert files(run(made, out=f"{made}/adapted", grpo=f"{made}/grpo")) != files(alone)
    shutil.copytree(
        made / "model", made / "moved"
    )  # the same weights in another place are the same model
    assert files(
        run(made, out=f"{made}/elsewhere", model_checkpoint=f"{made}/moved", grpo=f"{made}/grpo")
    ) == files(made / "adapted")
    with pytest.raises(BadInput, match="on which .* was trained"):
        run(made, out=f"{made}/wrong", model_checkpoint="tiny-qwen", grpo=f"{made}/grpo")


def test_number_type_and_cut_prompts(made):
    (system, tables), tokenizer = open_prompts(made / "prompts"), models.load("tiny-qwen")[1]
    lengths = [len(tokenizer.encode(chat(tokenizer, system, x))) for x in tables["train"].prompt]
    out = run(made, out=f"{made}/half", dtype="bfloat16", max_prompt_length=sorted(lengths)[18])
    ids, states = reasoning.open_states(out)
    assert states.dtype == torch.bfloat16 and len(ids) and states.isfinite().all()
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert 0 < facts["cut"] == sum(n > sorted(lengths)[18] for n in lengths) < 24


def test_no_answer_at_all(made):
    out = run(made, out=f"{made}/short", max_completion_length=3)
    ids, states = reasoning.open_states(out)
    assert ids.shape == (0,) and states.shape == (0, 3, 64)
    assert pd.read_parquet(out / "rationales.parquet").predicted.isna().all()


def test_bad_input(made, tmp_path):
    prompts(Made(f"{tmp_path}/prompts", train=0))
    with pytest.raises(BadInput, match="prompts of the split train"):
        run(tmp_path, model_checkpoint="tiny-qwen")
    done = subprocess.run(
        [sys.executable, "-m", "recnb.rating.reasoning", *flags(tmp_path, "out"), "--split", "dev"],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and "split" in done.stderr
    )
