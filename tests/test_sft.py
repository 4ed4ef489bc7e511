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

    given = dict(dtype="bfloat16", batch_by="beginning", max_steps=6)
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
    newest = tmp_path / "x.partial/checkpoints/checkpoint-6/optimizer.safetensors"
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


def test_copies_and_shards_give_the_losses_of_one_process(prompts, tmp_path, copies):
    common = dict(lora_dropout=0.0, max_steps=4)
    sft.run(params(prompts, tmp_path / "one", batch_size=4, **common))
    copies.run("recnb.poi.sft", params(prompts, tmp_path / "ddp", **common), processes=2)
    sharded = params(prompts, tmp_path / "fsdp", fsdp=True, **common)
    copies.run("fsdp_on_cpu recnb.poi.sft", sharded, processes=2)
    assert (
        load_artifact(tmp_path / "fsdp").facts["sharded"]
        and not load_artifact(tmp_path / "ddp").facts["sharded"]
    )
    for name in ("ddp", "fsdp"):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(map(str, adapter(tmp_path / "fsdp"))) == list(map(str, adapter(tmp_path / "one")))


def test_fsdp_without_gpus_is_refused_not_ignored(prompts, tmp_path):
    with pytest.raises(BadInput, match="fsdp"):
        sft.run(params(prompts, tmp_path / "x", fsdp=True))


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
