"The reasoning stage: shared work, kills, the states of the model's own tokens, bad input."

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from recnb import models
from recnb.artifacts import stage, write_json, write_parquet
from recnb.rating import alignment as alignment_stage
from recnb.rating import asking, reasoning
from recnb.rating.prompts import open_prompts, parse_answer, render_chat
from recnb.stages import BadInput, Folder, Source
from recnb.training import encode_pairs

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
FORM = "<think>\nThe user {}\n</think>\n\n<answer>{}</answer>"
SYSTEM = (
    "Which rating, from 1.0 to 5.0? First <think>why</think>, then <answer>the rating</answer>."
)


@dataclass
class Made:
    out: str
    train: int = 24


@stage("rating.prompts", Made)
def prompts(p, folder):
    rng = random.Random(0)
    row_id = 100
    for split, n in dict(train=p.train, validation=8, test=14).items():
        rows = []
        for _ in range(n):
            row_id += 3
            ratings = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
            rows.append(
                dict(
                    row_id=row_id,
                    user_id=f"u{row_id % 7}",
                    prompt="".join(f"Film {r}, é, {r}\n" for r in ratings) + "Next?",
                    label=float(rng.randint(1, 5)),
                    history_length=len(ratings),
                )
            )
        rng.shuffle(rows)
        columns = ["row_id", "user_id", "prompt", "label", "history_length"]
        write_parquet(pd.DataFrame(rows, columns=columns), folder / f"{split}.parquet")
    made = dict(system=SYSTEM, domain="movie", rule="count", leaky=False)
    write_json(made, folder / "prompts.json")


def teach(d, steps=110):
    "A tiny model that has seen the form of an answer, in a folder."
    model, tokenizer = models.load_model("tiny-qwen")
    system, tables = open_prompts(d / "prompts")
    chats = [render_chat(tokenizer, system, x) for x in tables["train"].prompt[:20]]
    moods = ["likes it", "may like this", "will not like it"]
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(steps):
        answers = [FORM.format(rng.choice(moods), rng.choice("12345")) for _ in range(8)]
        asked = [rng.choice(chats) for _ in answers]
        answers = [a + tokenizer.eos_token for a in answers]
        ids, labels = encode_pairs(tokenizer, asked, answers)
        n = max(map(len, ids))
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (n - len(i)) for i in ids])
        labels = torch.tensor([i + [-100] * (n - len(i)) for i in labels])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(d / "model")
    tokenizer.save_pretrained(d / "model")


@dataclass
class Adapted:
    model_checkpoint: Source
    out: str
    grpo: Folder = ""
    size: float = 0.3


def adapt(p, folder):
    model = models.add_lora(models.load_trained_model(p.model_checkpoint, p.grpo)[0])
    for name, w in model.named_parameters():
        w.data += p.size * ("lora_B" in name)
    model.save_pretrained(folder / "adapter")
    models.record_base_model(folder, p.model_checkpoint, *filter(None, [p.grpo]))


grpo = stage("rating.grpo", Adapted)(adapt)
alignment = stage("rating.alignment", Adapted)(adapt)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("rating")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompts(Made(f"{d}/prompts"))
    teach(d)
    yield d
    torch.set_num_threads(threads)


def run(d, **kw):
    given = dict(prompts=d / "prompts", model_checkpoint=d / "model", max_new_tokens=50)
    return reasoning.run(given | dict(out=d / "out", batch_size=5) | kw).path


def files(folder):
    names = ("rationales.parquet", "teacher_states.safetensors")
    return {f: (Path(folder) / f).read_bytes() for f in names}


def read_facts(folder):
    return json.loads((folder / "manifest.json").read_text())["facts"]


def open_states(folder):
    "row_ids (n,) and hidden states (n, L + 1, d)."
    found = load_file(folder / "teacher_states.safetensors")
    return found["row_id"], found["states"]


@pytest.fixture(scope="module")
def greedy(made):
    return run(made, out=made / "greedy")


@pytest.fixture(scope="module")
def sampled(made):
    return run(made, out=made / "sampled", temperature=1.0)


def build_command(d, out, *more):
    values = dict(prompts=d / "prompts", model_checkpoint=d / "model", out=d / out)
    values |= dict(max_new_tokens=50, batch_size=5)
    flags = [str(x) for k, v in values.items() for x in (f"--{k}", v)]
    return ["recnb.rating.reasoning", *flags, *map(str, more)]


def test_rationales(made, sampled):
    t = reasoning.RATIONALES.read(sampled)
    asked = open_prompts(made / "prompts")[1]["train"].set_index("row_id")
    tokenizer = models.load_trained_model(f"{made}/model")[1]
    assert t.columns.tolist() == list(reasoning.RATIONALES.columns)
    assert t.row_id.tolist() == sorted(asked.index) and not asked.index.is_monotonic_increasing
    for r in t.itertuples():
        ids = r.token_ids.tolist()
        answer = parse_answer(r.text)
        assert tokenizer.decode(ids) == r.text and r.tokens == len(ids) <= 50
        assert tokenizer.eos_token_id not in ids
        assert "</answer>" not in tokenizer.decode(ids[:-1])
        assert r.predicted == answer or (answer is None and pd.isna(r.predicted))
        assert r.correct == (answer == asked.label[r.row_id])
        if r.answer_at >= 0:
            assert tokenizer.decode(ids[: r.answer_at + 1]).endswith("<answer>")
            assert r.text.endswith("</answer>")
    facts = read_facts(sampled)
    assert facts["n"] == 24 == facts["unreadable"] + t.predicted.notna().sum()
    assert facts["correct"] == round(t.correct.mean(), 4)
    assert t.predicted.nunique() > 1 and t.correct.any() and not t.correct.all()
    assert sum(facts["labels_where_correct"].values()) == t.correct.sum()


def test_states_are_those_of_the_own_tokens_one_by_one(made, sampled):
    model, tokenizer = models.load_trained_model(f"{made}/model")
    system, tables = open_prompts(made / "prompts")
    t = reasoning.RATIONALES.read(sampled).set_index("row_id")
    ids, states = open_states(sampled)
    assert ids.dtype == torch.int64 and ids.tolist() == t.index[t.answer_at >= 0].tolist()
    assert len(ids) > 10 and states.shape[1:] == (3, 64)
    text = tables["train"].set_index("row_id").prompt
    for i, r in enumerate(ids.tolist()):
        asked = tokenizer.encode(render_chat(tokenizer, system, text[r]))
        tokens = asked + t.token_ids[r][: t.answer_at[r] + 1].tolist()
        with torch.inference_mode():
            plain = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        assert torch.allclose(states[i], torch.stack([h[0, -1] for h in plain]), atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_greedy_is_greedy_whatever_is_beside_it(name):
    model, tokenizer = models.load_model(name)
    texts = ["Rated 5.", "Rated 1, 2, 3, 4, 5, 1, 2, 3, 4, 5.", "é"]
    for text, found in zip(texts, asking.write_rationales(model, tokenizer, texts, 12)):
        ids = tokenizer.encode(text)
        for token in found:
            with torch.inference_mode():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert len(found) == 12


def test_seeds(made, sampled):
    again = run(made, out=made / "again", temperature=1.0, train_rows=24)
    assert files(again) == files(sampled)
    assert files(run(made, out=made / "other", temperature=1.0, seed=1)) != files(sampled)
    few = dict(train_rows=6, max_new_tokens=2)
    rows = [
        reasoning.RATIONALES.read(run(made, out=made / f"few{s}", seed=s, **few)).row_id.tolist()
        for s in (1, 2)
    ]
    assert rows[0] != rows[1] and len(set(rows[0])) == len(set(rows[1])) == 6


def test_two_processes_write_the_same_bytes(made, greedy, copies):
    given = dict(prompts=made / "prompts", model_checkpoint=made / "model", out=made / "shared")
    given |= dict(max_new_tokens=50, batch_size=5)
    copies.run("recnb.rating.reasoning", given, processes=2)
    assert files(made / "shared") == files(greedy)
    assert json.loads((made / "shared/manifest.json").read_text())["processes"] == 2


def test_killed_and_taken_up(made, tmp_path, monkeypatch, copies):
    prompts(Made(f"{tmp_path}/prompts", train=240))
    given = dict(prompts=tmp_path / "prompts", model_checkpoint=made / "model", batch_size=5)
    given |= dict(out=tmp_path / "out", max_new_tokens=50)
    parts = tmp_path / "out.partial/parts"
    copies.kill("recnb.rating.reasoning", given, lambda: any(parts.glob("*.jsonl")))
    done = len(list(tmp_path.glob("out.partial/parts/*.jsonl")))
    assert not (tmp_path / "out").exists() and 0 < done < 48
    calls = []
    write = asking.write_rationales
    monkeypatch.setattr(asking, "write_rationales", lambda *a: calls.append(1) or write(*a))
    resumed = files(run(tmp_path, model_checkpoint=made / "model"))
    assert len(calls) == 48 - done
    undisturbed = run(tmp_path, out=tmp_path / "again", model_checkpoint=made / "model")
    assert files(undisturbed) == resumed


def test_adapter_counts_and_must_fit(made, greedy):
    grpo(Adapted(f"{made}/model", f"{made}/grpo"))
    adapted = run(made, out=made / "adapted", grpo=made / "grpo")
    assert files(adapted) != files(greedy)
    # the same weights in another place are the same model
    shutil.copytree(made / "model", made / "moved")
    moved = dict(model_checkpoint=made / "moved", grpo=made / "grpo")
    assert files(run(made, out=made / "elsewhere", **moved)) == files(adapted)
    with pytest.raises(BadInput, match="on which .* was trained"):
        run(made, out=made / "wrong", model_checkpoint="tiny-qwen", grpo=made / "grpo")


def test_number_type_and_cut_prompts(made):
    system, tables = open_prompts(made / "prompts")
    tokenizer = models.load_model("tiny-qwen")[1]
    chats = [render_chat(tokenizer, system, x) for x in tables["train"].prompt]
    lengths = sorted(len(tokenizer.encode(x)) for x in chats)
    out = run(made, out=made / "half", dtype="bfloat16", max_prompt_length=lengths[18])
    ids, states = open_states(out)
    assert states.dtype == torch.bfloat16 and len(ids) and states.isfinite().all()
    assert 0 < read_facts(out)["cut"] == sum(n > lengths[18] for n in lengths) < 24


def test_no_answer_at_all(made):
    out = run(made, out=made / "short", max_new_tokens=3)
    ids, states = open_states(out)
    assert ids.shape == (0,) and states.shape == (0, 3, 64)
    assert reasoning.RATIONALES.read(out).predicted.isna().all()


@pytest.mark.parametrize("states", ["correct", "all"])
def test_a_right_rating_on_a_line_of_its_own_teaches_nothing(made, tmp_path, monkeypatch, states):
    "At its tag a model is about to write a line break: no state is kept, and none is missed."
    system, tables = open_prompts(made / "prompts")
    tokenizer = models.load_trained_model(f"{made}/model")[1]
    chats = {render_chat(tokenizer, system, r.prompt): r for r in tables["train"].itertuples()}

    def write(model, tokenizer, texts, *more):
        asked = [chats[t] for t in texts]
        right = ["\n" * (r.row_id % 2) + f"{r.label:.0f}" for r in asked]
        return [tokenizer.encode(FORM.format("may", x)) for x in right]

    monkeypatch.setattr(asking, "write_rationales", write)
    t = reasoning.RATIONALES.read(out := run(made, out=tmp_path / "out", states=states))
    apart = t.text.str.contains("<answer>\n")
    taught = t.row_id[~apart & (t.correct | (states == "all"))].tolist()
    assert t.predicted.notna().all() and t.correct[apart].any() and 8 < len(taught) < 16
    assert open_states(out)[0].tolist() == t.row_id[t.teaches].tolist() == taught
    facts = read_facts(out)
    assert (facts["rating_not_next"], facts["states"]) == (apart.sum(), len(taught))
    given = dict(prompts=str(made / "prompts"), model_checkpoint=str(made / "model"))
    given |= dict(reasoning=str(out), training_ratio=1.0, out="", rationales=states)
    p = alignment_stage.Params(**given)
    _, table, *_, unused = alignment_stage.load_inputs(p)
    assert alignment_stage.select_training_rows(p, table).row_id.tolist() == taught
    assert sorted([*unused.row, *taught]) == t.row_id.tolist()


def test_bad_input(made, tmp_path):
    prompts(Made(f"{tmp_path}/prompts", train=0))
    with pytest.raises(BadInput, match="prompts of the split train"):
        run(tmp_path, model_checkpoint="tiny-qwen")
    command = build_command(tmp_path, "out", "--split", "dev")
    done = subprocess.run([sys.executable, "-m", *command], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "split" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
