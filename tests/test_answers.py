"Training on answers: what is trained in which type, and what a step asks of the machine."

import collections
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from recnb import answers, models, packing
from recnb.training import TrainingParams, compute_answer_loss, encode_pairs, select_trainable

prompt = (
    "<s>[INST] <<SYS>>\nYou are user 7, who likes bars and parks in the morning, and is open.\n"
)
texts = [
    prompt + f"user 7 visited POI id {i}." * (1 + i % 3) + " Which is next? " for i in range(8)
]
replies = [f"user 7 will visit POI id {31 * i}. </s>" for i in range(8)]


def load(tuning="lora", dtype="float32", kind="tiny-llama"):
    quantization = "nf4" if tuning == "qlora" else None
    model, tokenizer = models.load_model(kind, None, dtype, quantization, "cpu")
    model.train()
    if tuning != "full":
        model = models.add_lora(model)
    return model, tokenizer


def build(folder, tuning="lora", dtype="float32", steps=3, **more):
    from trl import SFTConfig

    from recnb.training import trainer_arguments

    model, tokenizer = load(tuning, dtype)
    ids, labels = encode_pairs(tokenizer, texts, replies)
    p = TrainingParams(model_checkpoint="tiny-llama", batch_size=4, learning_rate=1e-2)
    args = SFTConfig(
        **trainer_arguments(Path(folder), steps, p, gpu=False) | more,
        max_length=None,
        dataset_kwargs=dict(skip_prepare_dataset=True),
        bf16=False,
    )
    data = Dataset.from_dict(dict(input_ids=ids, labels=labels))
    kind = None if tuning == "full" else getattr(torch, dtype)
    return answers.build_answer_trainer(model, tokenizer, args, data, kind)


@pytest.mark.parametrize("tuning", ["lora", "qlora", "full"])
def test_what_is_learned_is_added_up_in_float32(tmp_path, tuning):
    dtype = "float32" if tuning == "full" else "bfloat16"
    trainer = build(tmp_path, tuning, dtype)
    before = {n: w.detach().clone() for n, w in select_trainable(trainer.model).items()}
    assert {w.dtype for w in before.values()} == {getattr(torch, dtype)}
    trainer.train()
    weights = trainer.list_weights()
    assert weights.keys() == before.keys()
    assert {w.dtype for w in weights.values()} == {torch.float32}
    for name, w in select_trainable(trainer.model_wrapped).items():
        assert torch.equal(w, weights[name].to(w.dtype))
        kept = trainer.optimizer.optimizer.state[w]
        assert kept["exp_avg"].dtype == kept["exp_avg_sq"].dtype == torch.float32
    moved = [n for n, w in before.items() if not torch.equal(w.float(), weights[n])]
    assert len(moved) == len(before)


def test_updates_too_small_for_bfloat16_are_not_lost(tmp_path):
    trainer = build(tmp_path, "qlora", "bfloat16", learning_rate=2e-5, lr_scheduler_type="constant")
    before = {n: w.clone() for n, w in trainer.list_weights().items() if "lora_A" in n}
    before = {n: w.float() for n, w in before.items()}
    masters = trainer.optimizer_cls_and_kwargs[1]["masters"]
    assert {m.dtype for m in masters.values()} == {torch.float32}
    trainer.train()
    after = trainer.list_weights()
    seen = select_trainable(trainer.model_wrapped)
    share = [torch.ne(after[n], w).float().mean() for n, w in before.items()]
    alone = [torch.ne(seen[n].float(), w).float().mean() for n, w in before.items()]
    assert min(share) > 0.9 and max(alone) < 0.8  # two of the three steps have a gradient for A


class Count(TorchDispatchMode):
    "The operations that a device is asked for; views cost nothing."

    views = set(
        "view t transpose expand unsqueeze squeeze slice select as_strided detach alias permute "
        "_unsafe_view unbind split split_with_sizes chunk narrow empty empty_like empty_strided "
        "new_empty new_empty_strided lift_fresh _reshape_alias reshape set_ resize_".split()
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if (name := f._schema.name.removeprefix("aten::")) not in self.views:
            self.names.append(name)
        return f(*args, **(kwargs or {}))


def count_step(trainer):
    "The operations of each of three steps on the same rows, from forward to update."
    model = trainer.model
    rows = [trainer.train_dataset[0]]
    inputs = answers.collate_packed(rows)
    trainer.create_optimizer()
    learned = list(select_trainable(model).values())
    counts = []
    for _ in range(3):
        with Count() as count:
            loss, _ = packing.compute_packed_loss(model, packing.Packed(**inputs["packed"]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        counts.append(count.names)
    return counts


def test_every_step_asks_for_the_same(tmp_path):
    first, second, third = count_step(build(tmp_path, dtype="bfloat16"))
    assert second == third and collections.Counter(first)["zeros_like"] > 0
    assert "_local_scalar_dense" not in second  # nothing is read back before the step is done


def count_layers(num_layers, packed, monkeypatch):
    "What a model of so many layers is asked for in a forward and a backward pass."
    model, tokenizer = models.build_tiny_model(num_layers=num_layers)
    model = model.bfloat16().train()
    packing.allow_packing(model)
    model = models.add_lora(model)
    ids, labels = encode_pairs(tokenizer, texts[:4], replies[:4])
    if packed:
        weights = {w: w.detach().clone() for w in select_trainable(model).values()}
        answers.set_compute_type(weights, torch.bfloat16)

        def once(query, key, value, segments, masks, scaling, dropout):  # as a card does
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )

        monkeypatch.setattr(packing, "attend_by_segment", once)
        rows = packing.pack_rows(ids, labels, share=False)
        with Count() as count:
            packing.compute_packed_loss(model, rows)[0].backward()
        return collections.Counter(count.names)
    width = max(map(len, ids))
    x, y, mask = (
        torch.tensor([list(r) + [v] * (width - len(r)) for r in rows])
        for rows, v in ((ids, 0), (labels, -100), ([[1] * len(i) for i in ids], 0))
    )
    with Count() as count, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=x, attention_mask=mask, labels=y, use_cache=False).loss.backward()
    return collections.Counter(count.names)


@pytest.mark.parametrize("packed, operations, casts", [(False, 178, 40), (True, 146, 16)])
def test_what_a_layer_asks_for(packed, operations, casts, monkeypatch):
    two, three = (count_layers(n, packed, monkeypatch) for n in (2, 3))
    assert three.total() - two.total() == operations
    assert three["_to_copy"] - two["_to_copy"] == casts


def test_a_step_walks_through_no_frozen_module(tmp_path, monkeypatch):
    trainer = build(tmp_path, steps=4)
    walks = []
    for name in ("train", "zero_grad", "named_parameters"):

        def counting(self, *a, _name=name, _original=getattr(torch.nn.Module, name), **kw):
            if self is trainer.model or self is trainer.model.base_model:
                walks.append((trainer.state.global_step, _name))
            return _original(self, *a, **kw)

        monkeypatch.setattr(torch.nn.Module, name, counting)
    trainer.train()
    assert not [w for w in walks if w[0] in (1, 2)]


def fake_varlen(q, k, v, ends_q, ends_k, max_q, max_k, scale, window_size, enable_gqa):
    "What torch's attention of variable length gives, segment by segment; causal from the end."
    assert window_size == (-1, 0) and len(q) == ends_q[-1] and len(k) == ends_k[-1]
    out = []
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        assert b - a <= max_q and d - c <= max_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        one = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


def test_one_call_of_variable_length_is_given_what_the_segments_see(monkeypatch):
    from torch.nn.attention import varlen

    model, tokenizer = load()
    assert packing.allow_packing(model)
    packed = packing.pack_rows(*encode_pairs(tokenizer, texts, replies), least=8)
    apart = packing.pack_rows(*encode_pairs(tokenizer, texts, replies), share=False)
    assert packed.input_ids.shape[1] < 0.7 * packed.tokens == 0.7 * apart.input_ids.shape[1]
    expected = packing.compute_packed_loss(model, packed)[0]
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen)

    def at_once(query, key, value, segments, masks, scaling, dropout, given):
        names = ("key_index", "query_ends", "key_ends", "longest")
        parts = (getattr(given, n) for n in names)
        return packing.attend_at_once(query, key, value, *parts, scaling)

    for given in (packed, apart):
        monkeypatch.setattr(
            packing, "attend_by_segment", lambda *a, given=given: at_once(*a, given=given)
        )
        found = packing.compute_packed_loss(model, given)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["some layers", "all layers"])
def test_a_model_that_looks_only_so_far_back_is_trained_on_padded_rows(kind):
    from transformers import MistralConfig, MistralForCausalLM

    model, tokenizer = load("full")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    if kind == "all layers":  # without types
        shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32)
        shape |= dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
        model = MistralForCausalLM(MistralConfig(sliding_window=9, **shape))
    assert not packing.allow_packing(model)


def test_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model, tokenizer = load()
        packing.allow_packing(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        packed = packing.pack_rows(*encode_pairs(tokenizer, texts, replies))
        loss, _ = packing.compute_packed_loss(model, packed)
        loss.backward()
        found.append([loss, *(w.grad for w in select_trainable(model).values())])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [True, False])
def test_a_card_gives_the_loss_of_the_cpu(share):
    model, tokenizer = load("full", "bfloat16")
    packing.allow_packing(model)
    packed = packing.pack_rows(*encode_pairs(tokenizer, texts, replies), share=share)
    expected = packing.compute_packed_loss(model, packed)[0].item()
    moved = {k: v.cuda() if hasattr(v, "cuda") else v for k, v in packed._asdict().items()}
    found = packing.compute_packed_loss(model.cuda(), packing.Packed(**moved))[0].item()
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-qwen"])
def test_packed_rows_give_the_gradients_of_padded_ones(kind):
    model, tokenizer = load("full", kind=kind)
    packing.allow_packing(model)
    ids, labels = encode_pairs(tokenizer, texts, replies)
    width = max(map(len, ids))
    x = torch.tensor([i + [0] * (width - len(i)) for i in ids])
    y = torch.tensor([i + [-100] * (width - len(i)) for i in labels])
    found = []
    for loss in (
        compute_answer_loss(model, x, y)[0],
        packing.compute_packed_loss(model, packing.pack_rows(ids, labels))[0],
    ):
        model.zero_grad()
        loss.backward()
        found.append([loss, *(w.grad.clone() for w in model.parameters())])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
