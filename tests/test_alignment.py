"Alignment: each row has its own teacher; kills and processes change nothing."

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from recnb import models
from recnb.artifacts import hash_file, load_artifact, read_jsonl, stage, write_json, write_parquet
from recnb.rating import alignment
from recnb.rating.prompts import EMPTY_REASONING, find_digit_tokens, render_chat
from recnb.stages import BadInput, make_params

SYSTEM = "You rate films."
env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "5"}


def asked(n, first):
    for i in range(first, first + n):
        seen = "\n".join(f"Film {7 * i + k}, Drama, {1 + (i + k) % 5}" for k in range(1 + i % 4))
        yield dict(
            row_id=3 * i,
            user_id=f"u{i % 7}",
            prompt=f"Recent ratings:\n{seen}\n\nWhich rating for Film {i}?",
            label=float(1 + i % 5),
            history_length=1 + i % 4,
        )


@dataclass
class MadePrompts:
    out: str


@stage("rating.prompts", MadePrompts)
def make_prompts(p, folder):
    for s, n, first in (("train", 40, 0), ("validation", 10, 100), ("test", 4, 200)):
        write_parquet(pd.DataFrame(asked(n, first)), folder / f"{s}.parquet")
    write_json(dict(system=SYSTEM), folder / "prompts.json")


@dataclass
class MadeReasoning:
    out: str
    shift: int = 0  # moves the row_id of rationales and states
    order: int = 0  # seed of the order in which states are stored
    right: bool = True  # every second rationale ends in the label
    layers: int = 0  # extra layers
    width: int = 64


@stage("rating.reasoning", MadeReasoning)
def make_reasoning(p, folder):
    model, tokenizer = models.load_model("tiny-qwen", device="cpu")
    t = pd.DataFrame(asked(40, 0))
    states = []
    for r in t.itertuples():
        rationale = f"<think>\n{'Film Drama ' * (5 + r.row_id % 11)}{r.label}\n</think>\n\n<answer>"
        text = render_chat(tokenizer, SYSTEM, r.prompt) + rationale
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        states.append(torch.stack([h[0, -1] for h in hidden]))
    states = torch.stack(states)[:, :, : p.width]
    states = torch.cat([states, torch.zeros(40, p.layers, p.width)], 1)
    right = (np.arange(40) % 2 == 0) & p.right
    predicted = np.where(right, t.label, np.where(np.arange(40) % 4 == 1, np.nan, t.label % 5 + 1))
    # no answer, no state
    has = np.random.default_rng(p.order).permutation(np.flatnonzero(~np.isnan(predicted)))
    row_id = torch.tensor(t.row_id.to_numpy()[has] + p.shift)
    tensors = dict(row_id=row_id, states=states[has].contiguous())
    save_file(tensors, folder / "teacher_states.safetensors")
    rationales = dict(row_id=t.row_id + p.shift, predicted=predicted, correct=right)
    rationales |= dict(teaches=~np.isnan(predicted))
    write_parquet(pd.DataFrame(rationales), folder / "rationales.parquet")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    room = tmp_path_factory.mktemp("alignment")
    return dict(
        prompts=str(make_prompts(MadePrompts(str(room / "prompts"))).path),
        reasoning=str(make_reasoning(MadeReasoning(str(room / "reasoning"))).path),
    )


def params(made, out, **kw):
    given = dict(
        model_checkpoint="tiny-qwen",
        out=str(out),
        **made,
        dtype="float32",
        training_ratio=0.6,
        num_epochs=3,
        warmup_steps=2,
        learning_rate=3e-3,
        eval_steps=3,
        validation_rows=6,
        held_out_rows=4,
        save_steps=2,
    )
    return make_params(alignment.Params, given | kw)


same = "step loss ce align cosine cosine_first cosine_last learning_rate grad_norm rows tokens"


def metrics(out):
    return [[r[k] for k in same.split()] for r in read_jsonl(Path(out) / "metrics.jsonl")]


def written(out):
    return {
        str(f.relative_to(out)): hash_file(f)
        for f in sorted(Path(out).rglob("*"))
        if f.is_file() and f.name not in ("metrics.jsonl", "manifest.json")
    }


def adapter(out):
    return load_file(Path(out) / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("alignment") / "undisturbed"
    alignment.run(params(made, out))
    return out


def test_it_learns_and_writes_what_it_promises(made, undisturbed):
    a = load_artifact(undisturbed, "rating.alignment")
    assert sorted(written(undisturbed)) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "base_model.json",
        "dropped.parquet",
        "rows.parquet",
        "validation.jsonl",
    ]
    f = a.facts
    lines = metrics(undisturbed)
    seen = read_jsonl(a / "validation.jsonl")
    assert f["method"] == "HA" and f["kd_ratio"] == 1 and f["rows"] == 12
    assert len(lines) == f["steps"] == 9
    assert lines[-1][1] < lines[0][1] and seen[-1]["cosine"] > f["before"]["cosine"]
    assert [s["step"] for s in seen] == [3, 6, 9]
    assert all(sum(s["histogram"].values()) == 6 for s in seen)
    assert f["best_step"] == min(seen, key=lambda s: s["score"])["step"]
    rows = pd.read_parquet(a / "rows.parquet")
    asked = pd.read_parquet(Path(made["prompts"]) / "train.parquet").set_index("row_id")
    assert rows.teacher.equals(rows.row_id.astype("Int64"))
    assert (rows.label.to_numpy() == asked.label[rows.row_id]).all()
    assert (rows.row_id % 6 == 0).all()
    reasons = pd.read_parquet(a / "dropped.parquet").reason.value_counts().to_dict()
    assert reasons == {"no readable rating": 10, "another rating than the label": 10}


def test_the_adapter_opens_on_the_model(undisturbed):
    a, b = (
        models.load_trained_model("tiny-qwen", f, dtype="float32", device="cpu")[0]
        for f in ("", str(undisturbed))
    )
    changed = {
        n.split(".")[-2]
        for (n, x), y in zip(a.named_parameters(), b.parameters())
        if not torch.equal(x, y)
    }
    assert changed == {"k_proj", "v_proj"}


def test_killed_with_9_ends_in_the_same_bytes(made, undisturbed, tmp_path, copies):
    p, kept = params(made, tmp_path / "x"), tmp_path / "x.partial/checkpoints/checkpoint-2"
    copies.kill("recnb.rating.alignment", p, (kept / "sums.json").exists)
    assert "going on after step" in copies.run("recnb.rating.alignment", p)
    assert written(tmp_path / "x") == written(undisturbed) and metrics(tmp_path / "x") == metrics(
        undisturbed
    )


def test_two_processes_and_two_passes_make_the_steps_of_one(made, tmp_path, copies):
    p = params(made, tmp_path / "one", lora_dropout=0.0, max_steps=5, eval_steps=None, kd_ratio=0.5)
    alignment.run(p)
    alignment.run(
        replace(p, out=str(tmp_path / "passes"), batch_size=2, gradient_accumulation_steps=2)
    )
    shared = replace(p, out=str(tmp_path / "two"), batch_size=2, fsdp=True)
    copies.run("recnb.rating.alignment", shared, processes=2)
    first = adapter(tmp_path / "one")
    for name in ("passes", "two"):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
        assert all(
            torch.allclose(w, first[n], atol=1e-4) for n, w in adapter(tmp_path / name).items()
        )
        ours, theirs = (read_jsonl(tmp_path / n / "validation.jsonl")[-1] for n in (name, "one"))
        assert ours["mae_expected"] == pytest.approx(theirs["mae_expected"], abs=1e-4) and ours[
            "cosine"
        ] == pytest.approx(theirs["cosine"], abs=1e-4)


def test_states_are_found_by_row_and_not_by_place(made, undisturbed, tmp_path):
    other = str(make_reasoning(MadeReasoning(str(tmp_path / "r"), order=9)).path)
    a, b = (load_file(f"{r}/teacher_states.safetensors") for r in (made["reasoning"], other))
    assert not torch.equal(a["row_id"], b["row_id"])
    alignment.run(params({**made, "reasoning": other}, tmp_path / "x"))
    assert metrics(tmp_path / "x") == metrics(undisturbed) and written(tmp_path / "x") == written(
        undisturbed
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shift=3), "a row of the train or validation prompts"),
        (dict(shift=1), "row_id: found '1', expected a row of the train or validation prompts"),
        (dict(right=False), "expected a train row whose rationale is correct"),
        (dict(layers=1), "states of shape (30, 3, 64)"),
        (dict(width=32), "found '(30, 3, 32)'"),
    ],
)
def test_a_reasoning_that_does_not_fit_is_refused(made, tmp_path, change, message):
    other = str(make_reasoning(MadeReasoning(str(tmp_path / "r"), **change)).path)
    with pytest.raises(BadInput, match=re.escape(message)):
        alignment.run(params({**made, "reasoning": other}, tmp_path / "x"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reasoning=""), "--reasoning"),
        (dict(kd_ratio=-0.1), "kd_ratio"),
        (dict(target_modules=["query"]), "'query'"),
        (dict(max_prompt_length=20), "room for the question"),
        (dict(teacher="shuffled", train_rows=1), "two rows"),
    ],
)
def test_bad_input_is_one_line(made, tmp_path, change, message):
    with pytest.raises(BadInput, match=re.escape(message)) as e:
        alignment.run(params(made, tmp_path / "x", **change))
    assert "\n" not in str(e.value)


def test_the_sample_is_that_of_its_seed_whatever_the_loss(made, undisturbed, tmp_path):
    rows = {}
    for name, change in dict(
        KD=dict(align="KD", kd_ratio=0.5),
        shuffled=dict(teacher="shuffled", distance="l1_std"),
        random=dict(teacher="random"),
        other=dict(seed=1),
        fewer=dict(train_rows=5),
    ).items():
        a = alignment.run(params(made, tmp_path / name, max_steps=2, **change))
        rows[name] = pd.read_parquet(a / "rows.parquet")
        assert all(np.isfinite(r).all() for r in metrics(a.path))
    own = pd.read_parquet(undisturbed / "rows.parquet")
    assert rows["KD"].equals(own)
    assert rows["shuffled"].row_id.equals(own.row_id)
    assert rows["random"].teacher.isna().all()
    assert sorted(rows["shuffled"].teacher) == sorted(own.row_id)
    assert (rows["shuffled"].teacher != own.row_id).all()
    assert set(rows["other"].row_id) != set(own.row_id)
    assert set(rows["fewer"].row_id) < set(own.row_id) and len(rows["fewer"]) == 5


def test_cross_entropy_alone_needs_no_reasoning_and_takes_every_row(made, tmp_path):
    a = alignment.run(
        params(
            {**made, "reasoning": ""}, tmp_path / "x", kd_ratio=0, training_ratio=1.0, max_steps=3
        )
    )
    lines = read_jsonl(a / "metrics.jsonl")
    assert a.facts["method"] == "CE" and a.facts["rows"] == 40
    assert "cosine" not in lines[0] and lines[0]["loss"] == pytest.approx(lines[0]["ce"])


def test_cross_entropy_is_that_of_supervised_fine_tuning(made, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = models.load_model("tiny-qwen", device="cpu")
    digits = find_digit_tokens(tokenizer, render_chat(tokenizer, SYSTEM, "") + EMPTY_REASONING)
    t = pd.DataFrame(asked(4, 0))
    ids, _ = alignment.encode_student_texts(tokenizer, SYSTEM, t, 500)
    answers = [digits[int(label) - 1] for label in t.label]
    data = Dataset.from_dict(
        dict(
            input_ids=[i + [a] for i, a in zip(ids, answers)],
            labels=[[-100] * len(i) + [a] for i, a in zip(ids, answers)],
        )
    )
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        dataset_kwargs=dict(skip_prepare_dataset=True),
        per_device_train_batch_size=4,
    )
    theirs = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = theirs.data_collator([data[i] for i in range(4)])
    mine = alignment.collate_rows(
        [dict(input_ids=i, digit=a, row=0) for i, a in zip(ids, answers)], tokenizer.pad_token_id
    )
    model.eval()
    loss = alignment.compute_alignment_losses(
        model, mine, params(made, "x", kd_ratio=0), model.get_output_embeddings()
    )["loss"].mean()
    assert loss.item() == pytest.approx(theirs.compute_loss(model, batch).item(), abs=1e-5)


def test_bfloat16_and_recomputed_activations(made, tmp_path):
    a = alignment.run(params(made, tmp_path / "a", max_steps=3, lora_dropout=0.0))
    b = alignment.run(
        params(made, tmp_path / "b", max_steps=3, lora_dropout=0.0, gradient_checkpointing=True)
    )
    c = alignment.run(params(made, tmp_path / "c", max_steps=3, lora_dropout=0.0, dtype="bfloat16"))
    for x, y, z in zip(metrics(a.path), metrics(b.path), metrics(c.path)):
        assert x[:9] == pytest.approx(y[:9], rel=1e-4) and x[1] == pytest.approx(z[1], rel=0.1)
    kinds = {w.dtype for w in adapter(c.path).values()}
    assert kinds == {torch.float32}  # the updates would be lost in sixteen bits
