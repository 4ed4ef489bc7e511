"Training: equal runs give equal bytes, killed runs end as others do, processes share work."

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from processes import count_lines
from safetensors.torch import load_file

from recnb.artifacts import hash_file, load_artifact, stage, write_parquet
from recnb.poi import sft
from recnb.stages import BadInput

here = Path(__file__).parent
same = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "token_accuracy",
    "tokens",
]  # the others are timings


def rows(n=24):
    for i in range(n):
        visits = " ".join(
            f"At 2012-05-{d + 1:02d} 09:00:00, user {i} visited POI id {7 * d + i} "
            f"which is a Bar with category id {d}."
            for d in range(1 + i % 5)
        )
        answer = f"At 2012-06-01 09:00:00, user {i} will visit POI id "
        yield dict(
            instance_id=i,
            user_id=i,
            prompt=f"<s>[INST] <<SYS>>\nYou are user {i}.\n<</SYS>>\n\n{visits} "
            f"Which POI id will user {i} visit? [/INST] ",
            completion=f"{answer}{i * 3}. </s>",
            target_poi=i * 3,
            answer_prefix=answer,
        )


@dataclass
class Made:
    out: str


@stage("poi.prompts", Made)
def make(p, folder):
    write_parquet(pd.DataFrame(rows()), folder / "train.parquet")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return str(make(Made(str(tmp_path_factory.mktemp("sft") / "prompts"))).path)


def params(folder, out, **kw):
    return sft.Params(
        **{
            **dict(
                model_checkpoint="tiny-llama",
                prompts=folder,
                out=str(out),
                tuning="lora",
                lora_dropout=0.1,
                num_epochs=1,
                batch_size=2,
                learning_rate=1e-2,
                dtype="float32",
                save_steps=2,
            ),
            **kw,
        }
    )


LLM4POI = dict(
    modules_to_save=("embed_tokens", "norm"),
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=2,
)  # as its authors train


def metrics(out):
    return [
        [json.loads(line)[k] for k in same]
        for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ]


def adapter(out):
    return {f.name: hash_file(f) for f in sorted((Path(out) / "adapter").iterdir())}


@pytest.fixture(scope="session")
def undisturbed(prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "undisturbed"
    sft.run(params(prompts, out))
    return out


def test_it_learns_and_writes_what_it_promises(undisturbed):
    assert sorted(adapter(undisturbed)) == ["adapter_config.json", "adapter_model.safetensors"]
    lines = metrics(undisturbed)
    assert len(lines) == 12 and lines[-1][2] < lines[0][2]
    assert (
        not (undisturbed / "checkpoints").exists()
        and load_artifact(undisturbed, "poi.sft").facts["steps"] == 12
    )


def test_two_runs_with_one_seed_are_byte_identical(prompts, undisturbed, tmp_path):
    sft.run(params(prompts, tmp_path / "again"))
    assert adapter(tmp_path / "again") == adapter(undisturbed) and metrics(
        tmp_path / "again"
    ) == metrics(undisturbed)
    assert (
        load_artifact(tmp_path / "again").digest == load_artifact(undisturbed).digest
    )  # timings are not part of the result


class Stop(Exception):
    pass


@pytest.mark.parametrize("at, later", [(1, None), (3, 6), (12, None)])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(
    prompts, undisturbed, tmp_path, monkeypatch, capsys, at, later
):
    from transformers import Trainer

    original = Trainer._maybe_log_save_evaluate
    for step in filter(None, (at, later)):

        def stopping(self, *a, **kw):
            if self.state.global_step == step and step < 12:
                raise Stop
            original(self, *a, **kw)
            if self.state.global_step == step:
                raise Stop

        monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", stopping)
        with pytest.raises(Stop):
            sft.run(params(prompts, tmp_path / "x"))
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", original)
    sft.run(params(prompts, tmp_path / "x"))
    assert adapter(tmp_path / "x") == adapter(undisturbed) and metrics(tmp_path / "x") == metrics(
        undisturbed
    )
    assert ("going on after step" in capsys.readouterr().err) == (at > 2)


def test_sums_kept_apart_from_16_bit_weights_survive_a_kill(prompts, tmp_path, monkeypatch):
    from transformers import Trainer

    given = dict(dtype="bfloat16", batch_by="beginning", max_steps=6, **LLM4POI)
    sft.run(params(prompts, tmp_path / "whole", **given))
    original = Trainer._maybe_log_save_evaluate

    def stopping(self, *a, **kw):
        original(self, *a, **kw)
        if self.state.global_step == 3:
            raise Stop

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", stopping)
    with pytest.raises(Stop):
        sft.run(params(prompts, tmp_path / "x", **given))
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", original)
    sft.run(params(prompts, tmp_path / "x", **given))
    assert adapter(tmp_path / "x") == adapter(tmp_path / "whole")
    assert metrics(tmp_path / "x") == metrics(tmp_path / "whole")
    weights = load_file(tmp_path / "x/adapter/adapter_model.safetensors").values()
    assert {str(w.dtype) for w in weights} == {"torch.float32"}


def test_a_broken_checkpoint_falls_back_to_the_one_before(
    prompts, undisturbed, tmp_path, monkeypatch, capsys
):
    from transformers import Trainer

    original = Trainer._maybe_log_save_evaluate

    def stopping(self, *a, **kw):
        original(self, *a, **kw)
        if self.state.global_step == 7:
            raise Stop

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", stopping)
    with pytest.raises(Stop):
        sft.run(params(prompts, tmp_path / "x"))
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", original)
    newest = (
        tmp_path / "x.partial/checkpoints/checkpoint-6/shard-00001-model-00001-of-00001.safetensors"
    )
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    sft.run(params(prompts, tmp_path / "x"))
    err = capsys.readouterr().err
    assert err.count("incomplete") == 1 and "going on after step 4" in err
    assert adapter(tmp_path / "x") == adapter(undisturbed) and metrics(tmp_path / "x") == metrics(
        undisturbed
    )


def test_killed_with_9_in_another_process(prompts, undisturbed, tmp_path, copies):
    p, log = params(prompts, tmp_path / "x"), tmp_path / "x.partial/metrics.jsonl"
    copies.kill("recnb.poi.sft", p, lambda: count_lines(log) >= 5)
    copies.run("recnb.poi.sft", p)
    assert adapter(tmp_path / "x") == adapter(undisturbed) and metrics(tmp_path / "x") == metrics(
        undisturbed
    )


def assert_same_training(ours, theirs):
    for ours, theirs in zip(metrics(ours), metrics(theirs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("tuning", ["copies", "full", "llm4poi"])
def test_two_processes_give_the_losses_of_one(prompts, tmp_path, copies, tuning):
    given = dict(lora_dropout=0.0, tuning="lora" if tuning == "copies" else tuning)
    given.update(train_rows=10)  # of the last step, the second process has none
    given.update(learning_rate=1e-3 if tuning in ("full", "llm4poi") else 1e-2)
    if tuning == "llm4poi":
        given.update(LLM4POI, tuning="qlora")
    sft.run(params(prompts, tmp_path / "one", batch_size=4, **given))
    given.update(gradient_checkpointing=tuning == "llm4poi")  # as on cards
    p = params(prompts, tmp_path / "two", fsdp=tuning != "copies", **given)
    copies.run("recnb.poi.sft", p, processes=2)
    assert load_artifact(tmp_path / "two").facts["sharded"] == (tuning != "copies")
    assert_same_training(tmp_path / "two", tmp_path / "one")
    files = [f.relative_to(tmp_path / "one") for f in (tmp_path / "one").glob("*/*.safetensors")]
    for f in files:
        ours, theirs = load_file(tmp_path / "two" / f), load_file(tmp_path / "one" / f)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].allclose(theirs[n], atol=2e-3) for n in ours)


def test_what_two_processes_began_one_ends(prompts, tmp_path, copies, capsys):
    given = dict(lora_dropout=0.0, max_steps=5, num_epochs=2)
    sft.run(params(prompts, tmp_path / "one", batch_size=4, **given))
    p, log = params(prompts, tmp_path / "x", fsdp=True, **given), tmp_path / "x.partial"
    copies.kill("recnb.poi.sft", p, lambda: count_lines(log / "metrics.jsonl") >= 3, processes=2)
    assert len(list(log.glob("checkpoints/checkpoint-2/*.safetensors"))) == 2
    capsys.readouterr()
    ended = sft.run(p)
    assert "going on after step 2" in capsys.readouterr().err
    assert_same_training(tmp_path / "x", tmp_path / "one")
    made = ended.manifest
    assert (made["processes"], made["begun"], made["facts"]["sharded"]) == (1, 2, False)
    assert sft.run(p).manifest["finished"] == made["finished"]  # and nothing is made again


@pytest.mark.parametrize(
    "tuning, files",
    [
        ("qlora", ["adapter_config.json", "adapter_model.safetensors"]),
        ("full", ["config.json", "model.safetensors"]),
    ],
)
def test_the_other_kinds_of_tuning(prompts, tmp_path, tuning, files):
    a = sft.run(
        params(
            prompts,
            tmp_path / "x",
            tuning=tuning,
            max_steps=3,
            batch_size=4,
            gradient_accumulation_steps=2,
        )
    )
    folder = tmp_path / "x" / ("model" if tuning == "full" else "adapter")
    assert set(files) <= {f.name for f in folder.iterdir()} and a.facts["steps"] == 3
    assert not [
        f for f in (tmp_path / "x").rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")
    ]
    if tuning == "full":
        from recnb.models import load_model as load_model

        load_model(str(folder), device="cpu")


def test_accumulated_steps_equal_one_large_step(prompts, tmp_path):
    common = dict(lora_dropout=0.0, max_steps=3, learning_rate=1e-3, seed=1)
    sft.run(params(prompts, tmp_path / "a", batch_size=24, **common))  # every prompt in each step,
    sft.run(
        params(prompts, tmp_path / "b", batch_size=6, gradient_accumulation_steps=4, **common)
    )  # whatever the order
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b")):
        assert [a[2], a[4]] == pytest.approx([b[2], b[4]], rel=1e-4)


def test_embeddings_and_norms_are_trained_beside_an_adapter(prompts, tmp_path):
    "The first step has the gradients of plain torch; the opened model is the trained one."
    import torch

    from recnb import models
    from recnb.training import compute_answer_loss

    given = dict(batch_size=24, lora_dropout=0.0, learning_rate=1e-3, seed=1)
    p = params(prompts, tmp_path / "x", max_steps=4, num_epochs=4, **given, **LLM4POI)
    data, _ = sft.tokenise_prompts(p, models.load_tokenizer("tiny-llama"))
    width = max(map(len, data["input_ids"]))
    ids = torch.tensor([x + [0] * (width - len(x)) for x in data["input_ids"]])
    labels = torch.tensor([x + [-100] * (width - len(x)) for x in data["labels"]])
    model = sft.load_trainable_model(p)[0]
    loss, _, _ = compute_answer_loss(model, ids, labels)
    loss.backward()
    trained = {w for w in model.parameters() if w.requires_grad}
    norm = torch.cat([w.grad.flatten() for w in trained]).norm()
    sft.run(p)
    lines = metrics(tmp_path / "x")
    assert lines[0][2] == pytest.approx(loss.item(), rel=1e-5)
    assert lines[0][4] == pytest.approx(norm.item(), rel=1e-4)
    rates = [line[3] for line in lines]
    assert rates[-1] == rates[-2] == 1e-3 and rates[0] < rates[1] < 1e-3 + 1e-9
    plain = models.load_model("tiny-llama", device="cpu")[0]
    opened = models.load_trained_model("tiny-llama", tmp_path / "x", device="cpu")[0]
    assert compute_answer_loss(opened, ids, labels)[0] < lines[-1][2] < lines[0][2]
    moved = {
        n.split(".")[-2]
        for n, w in opened.named_parameters()
        if not torch.equal(w, plain.get_parameter(n))
    }
    assert {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"} < moved
    assert opened.get_output_embeddings().weight.equal(opened.get_input_embeddings().weight)
    with pytest.raises(BadInput, match="modules_to_save"):
        sft.run(params(prompts, tmp_path / "y", modules_to_save=("table",)))


def test_what_is_too_long_is_counted(prompts, tmp_path):
    a = sft.run(params(prompts, tmp_path / "x", max_length=200, max_steps=1))
    dropped = pd.read_parquet(a / "dropped.parquet")
    assert (
        len(dropped) == a.facts["too_long"] > 0
        and (dropped.tokens > 200).all()
        and dropped.reason[0] == "longer than 200 tokens"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_checkpoint="models/that/is/not/there"), "no model at models/that/is/not/there"),
        (dict(model_checkpoint="tiny-lama"), "no model at tiny-lama"),
        (dict(target_modules=["query"]), "'query'"),
        (dict(max_length=5), "max_length"),
        (dict(prompts=""), "--prompts"),
    ],
)
def test_bad_input_is_one_line(prompts, tmp_path, change, message):
    with pytest.raises(BadInput, match=re.escape(message)) as e:
        sft.run(params(prompts, tmp_path / "x", **change))
    assert "\n" not in str(e.value)


def test_the_command_ends_with_2_and_one_line(prompts, tmp_path, copies):
    p = params(prompts, tmp_path / "x", model_checkpoint="./nowhere")
    assert copies.refuse("recnb.poi.sft", p).startswith("sft: no model at ./nowhere")
