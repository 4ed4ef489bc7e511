"Exact ranking against teacher forcing of every id, for various tokenizers, catalogues, dtypes."

import numpy as np
import pytest

import recnb.ranking as ranking
from recnb.ranking import (
    Trie,
    build_tree,
    count_batch_tokens,
    find_ids,
    plan_batches,
    rank_of,
    score_by_brute_force,
    score_catalogue,
    score_ids,
    search_catalogue,
    select_best,
)
from recnb.stages import BadInput

torch = pytest.importorskip("torch")
BEFORE = "At 2012-04-03 18:00:09 user 7 goes to POI "
PROMPT = "<s>[INST] User 7 was at POI 12, then at POI 930. [/INST] " + BEFORE
NESTED = [1, 12, 123, 1234, 12345, 2, 20, 200]


def merging_tokenizer():
    "One token for a number and the space before it, as GPT-2 has."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    t.train_from_iterator(
        [f"user goes to POI {i}." for i in range(600)],
        trainers.BpeTrainer(
            vocab_size=800,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=t)


@pytest.fixture(scope="module")
def pairs():
    "Tokenizer kind → (model in float64 with far from uniform distributions, tokenizer)."
    from transformers import LlamaConfig, LlamaForCausalLM

    from recnb.models import build_tiny_tokenizer

    out = {}
    for kind in ("single", "grouped", "merging"):
        tokenizer = merging_tokenizer() if kind == "merging" else build_tiny_tokenizer(kind)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
        out[kind] = LlamaForCausalLM(config).double().eval(), tokenizer
    return out


@pytest.mark.parametrize("kind", ["single", "grouped", "merging"])
@pytest.mark.parametrize("score", ["constrained", "raw"])
@pytest.mark.parametrize(
    "ids", [NESTED, [0], [7, 8], range(0, 1100, 9)], ids=["nested", "one", "two", "many"]
)
def test_equals_brute_force(pairs, kind, score, ids):
    model, tokenizer = pairs[kind]
    trie = Trie(tokenizer, ids, BEFORE)
    fast = score_catalogue(model, tokenizer, PROMPT, trie, score)
    probe = trie.ids[:: max(1, len(trie.ids) // 15)]
    slow = score_by_brute_force(model, tokenizer, PROMPT, trie, probe, score)
    assert np.abs(fast[np.searchsorted(trie.ids, probe)] - slow).max() < 1e-6
    assert (
        np.exp(fast).sum() == pytest.approx(1, abs=1e-9)
        if score == "constrained"
        else np.exp(fast).sum() < 1
    )


@pytest.mark.parametrize("kind", ["single", "grouped", "merging"])
def test_equals_a_walk_written_apart(pairs, kind):
    "The definition without the module's code: log-softmax over texts that continue the prompt."
    model, tokenizer = pairs[kind]
    trie = Trie(tokenizer, NESTED, BEFORE)
    text = tokenizer.encode(PROMPT)
    whole = {i: tokenizer.encode(f"{PROMPT}{i}.") for i in NESTED}
    keep = min(
        next(k for k, (a, b) in enumerate(zip(w + [-1], text + [-2])) if a != b)
        for w in whole.values()
    )
    for i, w in whole.items():
        with torch.inference_mode():
            logp = model(torch.tensor([w])).logits[0].log_softmax(-1)
        raw = sum(logp[k - 1, w[k]].item() for k in range(keep, len(w)))
        among = [{v[k] for v in whole.values() if v[:k] == w[:k]} for k in range(keep, len(w))]
        constrained = raw - sum(
            logp[k - 1, sorted(a)].logsumexp(0).item() for k, a in zip(range(keep, len(w)), among)
        )
        at = list(trie.ids).index(i)
        assert score_catalogue(model, tokenizer, PROMPT, trie, "raw")[at] == pytest.approx(
            raw, abs=1e-6
        )
        assert score_catalogue(model, tokenizer, PROMPT, trie)[at] == pytest.approx(
            constrained, abs=1e-6
        )


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-4), ("bfloat16", 0.5)])
@pytest.mark.parametrize("score", ["constrained", "raw"])
def test_number_types(pairs, dtype, tolerance, score):
    import copy

    tokenizer = pairs["single"][1]
    model, trie = (
        copy.deepcopy(pairs["single"][0]).to(getattr(torch, dtype)),
        Trie(tokenizer, range(300), BEFORE),
    )
    gap = score_catalogue(model, tokenizer, PROMPT, trie, score)[::17] - score_by_brute_force(
        model, tokenizer, PROMPT, trie, trie.ids[::17], score
    )
    assert np.abs(gap).max() < tolerance


def test_other_architecture_and_bias(pairs):
    "Qwen3 with grouped digits, and a head with a bias."
    from recnb.models import build_tiny_model

    model, tokenizer = build_tiny_model("qwen", hidden_size=32)
    model = model.double()
    model.lm_head = torch.nn.Linear(32, len(tokenizer), bias=True).double()
    trie = Trie(tokenizer, [*NESTED, *range(300, 360)], BEFORE)
    for score in ("constrained", "raw"):
        gap = score_catalogue(model, tokenizer, PROMPT, trie, score) - score_by_brute_force(
            model, tokenizer, PROMPT, trie, trie.ids, score
        )
        assert np.abs(gap).max() < 1e-6


def test_adapter_unmerged(pairs):
    from recnb.models import add_lora, build_tiny_model

    model, tokenizer = build_tiny_model("llama")
    model = add_lora(model.double()).eval()
    for name, w in model.named_parameters():
        w.data += 0.1 * ("lora_B" in name)
    trie = Trie(tokenizer, NESTED, BEFORE)
    gap = score_catalogue(model, tokenizer, PROMPT, trie) - score_by_brute_force(
        model, tokenizer, PROMPT, trie, trie.ids
    )
    assert np.abs(gap).max() < 1e-6


@pytest.mark.parametrize("size", [1, 5, 64])
def test_passes_of_any_size(pairs, size):
    model, tokenizer = pairs["single"]
    trie = Trie(tokenizer, range(150), BEFORE)
    for score in ("constrained", "raw"):
        whole = score_catalogue(model, tokenizer, PROMPT, trie, score)
        trie.trees[score] = build_tree(trie.paths, score, size)
        assert np.abs(score_catalogue(model, tokenizer, PROMPT, trie, score) - whole).max() < 1e-9


def test_nyc_needs_some_five_hundred_nodes(pairs):
    trie = Trie(pairs["single"][1], range(4980), BEFORE)
    assert len(trie.tree().rows) - 1 == 497
    assert len(trie.tree("raw").rows) - 1 == 4980


def test_long_terminator(pairs):
    "A terminator of several tokens costs the constrained score nothing and counts in the raw one."
    model, tokenizer = pairs["single"]
    short, long = Trie(tokenizer, NESTED, BEFORE), Trie(tokenizer, NESTED, BEFORE, ". </s>")
    assert score_catalogue(model, tokenizer, PROMPT, long) == pytest.approx(
        score_catalogue(model, tokenizer, PROMPT, short), abs=1e-9
    )
    assert (
        score_catalogue(model, tokenizer, PROMPT, long, "raw")
        < score_catalogue(model, tokenizer, PROMPT, short, "raw")
    ).all()


def test_refusals(pairs):
    single, grouped, merging = (pairs[k][1] for k in ("single", "grouped", "merging"))
    with pytest.raises(BadInput, match="at least one id"):
        Trie(single, [], BEFORE)
    with pytest.raises(BadInput, match="terminator"):
        Trie(single, [1, 12], BEFORE, "")
    with pytest.raises(BadInput, match="more text"):
        Trie(merging, [1, 12], " ")
    with pytest.raises(BadInput, match="constrained or raw"):
        Trie(single, [1], BEFORE).tree("best")
    with pytest.raises(BadInput, match="tokenised"):
        Trie(grouped, [1, 12], BEFORE).encode_prompt(grouped, "goes to POI 5")


def test_order_and_ties():
    scores = np.log([0.1, 0.3, 0.1, 0.3, 0.2])
    ids = np.array([2, 3, 5, 7, 11])
    assert select_best(scores, ids)[0].tolist() == [3, 7, 11, 2, 5]
    assert [rank_of(scores, ids, i) for i in (3, 7, 11, 2, 5)] == [1, 2, 3, 4, 5]
    assert rank_of(scores, ids, 4) is None and rank_of(scores, ids, 12) is None


TEXTS = [PROMPT, "User 7 was at POI 3. " * 4 + BEFORE, BEFORE, PROMPT.replace("930", "31")]


@pytest.mark.parametrize("kind", ["single", "grouped", "merging"])
@pytest.mark.parametrize("score", ["constrained", "raw"])
@pytest.mark.parametrize("ids", [NESTED, [0], range(0, 1100, 9)], ids=["nested", "one", "many"])
def test_search_equals_the_walk(pairs, monkeypatch, kind, score, ids):
    "Ranks up to the limit, the best ids that are certain, and every score that is known."
    monkeypatch.setattr(ranking, "WHOLE", 0)
    model, tokenizer = pairs[kind]
    trie = Trie(tokenizer, ids, BEFORE)
    walks = [score_catalogue(model, tokenizer, text, trie, score) for text in TEXTS]
    for start in range(0, len(trie.ids), max(1, len(trie.ids) // 6)):
        places = [start, None, len(trie.ids) - 1, start]
        found = search_catalogue(model, tokenizer, TEXTS, trie, places, score, limit=5, size=8)
        for at, scores, whole, k in zip(places, found.sum_scores(), walks, found.count_proven()):
            scores, known = scores.numpy(), np.isfinite(scores.numpy())
            assert np.abs(scores - whole)[known].max() < 1e-9
            best = select_best(whole, trie.ids, int(k))[0]
            assert k and (select_best(scores, trie.ids, int(k))[0] == best).all()
            ranks = [rank_of(x, trie.ids, trie.ids[at or 0]) for x in (scores, whole)]
            assert at is None or ranks[0] == ranks[1] or min(ranks) > 5


def test_search_opens_few_rows(pairs):
    "New York has 497 rows; what is opened is counted, not timed."
    model, tokenizer = pairs["single"]
    for n, most in ((4980, 250),):
        trie = Trie(tokenizer, range(n), BEFORE)
        whole = score_catalogue(model, tokenizer, PROMPT, trie)
        for at in (int(whole.argmax()), 930):
            found = search_catalogue(model, tokenizer, [PROMPT], trie, [at])
            rank = rank_of(whole, trie.ids, trie.ids[at])
            told = rank_of(found.sum_scores()[0].numpy(), trie.ids, trie.ids[at])
            assert told == rank if rank <= 20 else told > 20
            assert found.slots.shape[1] < most


def test_equal_scores_are_opened(pairs, monkeypatch):
    "A model that finds all ids alike: the lower id comes first, as in the walk."
    import copy

    monkeypatch.setattr(ranking, "WHOLE", 0)
    model, tokenizer = copy.deepcopy(pairs["single"][0]), pairs["single"][1]
    torch.nn.init.zeros_(model.lm_head.weight)
    trie = Trie(tokenizer, range(10, 100), BEFORE)
    whole = score_catalogue(model, tokenizer, PROMPT, trie)
    for at in (0, 3, 12):
        found = search_catalogue(model, tokenizer, [PROMPT], trie, [at], limit=20)
        scores = found.sum_scores()[0].numpy()
        assert rank_of(scores, trie.ids, trie.ids[at]) == rank_of(whole, trie.ids, trie.ids[at])


def test_memory_of_prompts_that_begin_alike(pairs):
    model, tokenizer = pairs["single"]
    trie = Trie(tokenizer, range(300), BEFORE)
    memory = {}
    for text in (*TEXTS, TEXTS[0], TEXTS[0]):
        found = search_catalogue(model, tokenizer, [text], trie, [7], memory=memory)
        fresh = search_catalogue(model, tokenizer, [text], trie, [7])
        assert torch.allclose(found.sum_scores(), fresh.sum_scores(), atol=1e-9)
        assert memory["cache"].get_seq_length() == len(memory["tokens"])


def test_scores_of_given_ids(pairs):
    model, tokenizer = pairs["grouped"]
    trie = Trie(tokenizer, range(0, 1100, 9), BEFORE)
    for score in ("constrained", "raw"):
        some = score_ids(model, tokenizer, PROMPT, trie, [990, 9], score)
        slow = score_by_brute_force(model, tokenizer, PROMPT, trie, [990, 9], score)
        assert np.abs(some - slow).max() < 1e-6
    with pytest.raises(BadInput, match="an id of the catalogue"):
        score_ids(model, tokenizer, PROMPT, trie, [1])


def test_ids_in_a_prompt(pairs):
    trie = Trie(pairs["single"][1], [7, 12, 930], BEFORE)
    assert trie.ids[find_ids("12, 930, 12, 5, 7, " + "9" * 40, trie)].tolist() == [7, 12, 930]


def test_batches_hold_every_prompt_once(pairs):
    rng = np.random.default_rng(0)
    prompts = [[1, 2, *rng.integers(0, 9, k).tolist()] for k in rng.integers(0, 90, 200)]
    for size, most in ((1, 99), (16, 500), (64, 32768)):
        plan = plan_batches(prompts, size, most)
        assert sorted(i for batch in plan for i in batch) == [*range(200)]
        assert max(map(len, plan)) <= size
        for batch in plan:
            longest = max(len(prompts[i]) for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= most
    assert count_batch_tokens([[1, 2, 3], [1, 2]]) == 2 + 2


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_layers_with_a_window(pairs, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = pairs["single"][1]
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
    shape |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    if kind == "gemma3_text":
        shape |= dict(layer_types=["sliding_attention", "full_attention"])
    config = AutoConfig.for_model(kind, sliding_window=9, initializer_range=0.3, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    trie = Trie(tokenizer, range(300), BEFORE)
    probe = trie.ids[::29]
    slow = score_by_brute_force(model, tokenizer, PROMPT, trie, probe)
    assert np.abs(score_catalogue(model, tokenizer, PROMPT, trie)[::29] - slow).max() < 1e-6
    assert np.abs(score_ids(model, tokenizer, PROMPT, trie, probe) - slow).max() < 1e-6
    places = [*range(len(TEXTS))]
    together = search_catalogue(model, tokenizer, TEXTS, trie, places).sum_scores()
    for text, scores in zip(TEXTS, together.numpy()):
        known = np.isfinite(scores)
        whole = score_catalogue(model, tokenizer, text, trie)
        assert np.abs(scores - whole)[known].max() < 1e-6
