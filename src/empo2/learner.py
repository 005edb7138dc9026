"""Learner: owns the weights and the optimiser. Knows sequences and numbers; nothing of tips, environments or modes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from empo2 import losses
from empo2.attention import AttendSegments
from empo2.config import LearnerConfig, LossConfig
from empo2.errors import TrainingDiverged
from empo2.frozen import FrozenLayers, replaced
from empo2.sequences import Pack, pack
from empo2.types import SpanKey, TrainingSequence

MOST_LOGITS = 2**24  #: computed at once, of a vocabulary at some places: 64 MB in float32, and a few copies of that

Logprobs = dict[SpanKey, tuple[float, ...]]  #: log-probs of a completion's tokens, by the turn they belong to


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What one optimiser update saw. Means are over all completion tokens of the mini-batch."""

    loss: float
    entropy: float  #: nats
    ratio_mean: float
    ratio_max: float
    clip_fraction: float  #: share of tokens where clipping or the dual clip decided
    masked_fraction: float  #: share of tokens below δ
    kl: float  #: nats, over the tokens that the KL term holds
    grad_norm: float  #: before clipping
    num_tokens: int  #: completion tokens trained
    num_held: int  #: of them, those that the KL term holds
    num_computed: int  #: tokens that went through the policy and the reference
    sampler_gap_mean: float  #: |log-prob of trainer − of sampler|, where the trained rendering was sampled
    sampler_gap_max: float
    skipped: bool  #: NaN or infinity: nothing was changed


@dataclass
class _Sums:
    """Running sums over the micro-batches of one update."""

    loss: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    clipped: float = 0.0
    masked: float = 0.0
    kl: float = 0.0
    held: int = 0
    gap: float = 0.0
    gap_tokens: int = 0
    gap_max: float = 0.0


class Learner:
    """``model`` uses `attention.NAME` and holds float32 master weights; ``compute_dtype`` is autocast's.

    Parameters that need no gradient stay as they are.

    Log-probs are those of softmax(logits / ``temperature``): the distribution that episodes are sampled from.
    """

    def __init__(
        self,
        model: Any,
        config: LearnerConfig,
        loss: LossConfig,
        *,
        temperature: float,
        compute_dtype: torch.dtype = torch.float32,
        reference: Any = None,
    ) -> None:
        self.model = model.eval()  # no dropout: behavior and current log-probs must agree
        self._config, self._loss = config, loss
        self._temperature = temperature or 1.0
        self._compute_dtype = compute_dtype
        self._reference = reference.eval().requires_grad_(False) if reference is not None else None
        self._device = next(model.parameters()).device
        self._frozen = FrozenLayers(model)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.skipped_in_a_row = 0
        self.tokens_computed = 0  #: that went through the model, in updates and for log-probs

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, not copied."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name, for a safetensors file."""
        found = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value.detach().contiguous()
        return found

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take over saved weights and the optimiser's state."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
                saved = {key: f"{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
                if saved["step"] in optimizer:
                    # the fused optimiser keeps its step count beside the parameter
                    self.optimizer.state[parameter] = {
                        key: optimizer[full].to(self._device) for key, full in saved.items()
                    }

    @torch.no_grad()
    def prepare(self, sequences: Sequence[TrainingSequence]) -> None:
        """Compute what the frozen layers make of a step's sequences, for every later pass over them; forget the last.

        It changes no result, and `logprobs` and `update` take other sequences as well.
        """
        self._frozen.forget()
        if self._frozen.layers:
            for packed in pack(sequences, self._config.micro_batch_tokens):
                with self._autocast():
                    self._frozen.compute(packed, **self._inputs(packed))

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TrainingSequence]) -> Logprobs:
        """Log-probs of all completions under the current weights."""
        found: Logprobs = {}
        for packed in pack(sequences, self._config.micro_batch_tokens):
            hidden = self._hidden(self.model, packed)
            values = [0.0] * len(packed.targets)
            for part in self._parts(packed):
                logprobs = self._logprobs(self.model, hidden[part.places])
                for token, value in zip(part.tokens, part.drawn(logprobs).tolist(), strict=True):
                    values[token] = value
            for span in _spans(packed):
                count = span.stop - span.start
                found[span.key], values = tuple(values[:count]), values[count:]
        return found

    def update(
        self, sequences: Sequence[TrainingSequence], behavior: Mapping[SpanKey, Sequence[float]], lr: float
    ) -> UpdateStats:
        """One optimiser update on a mini-batch.

        ``behavior``: log-probs of the importance ratio's denominator; where a span has none, they equal the current
        ones and the ratio is exactly 1. Raises TrainingDiverged when a third update in a row holds NaN or infinity.
        """
        loss = self._loss
        lengths = [sequence.num_trained for sequence in sequences]
        weights = losses.token_weights(lengths, loss.aggregation, fixed_length=loss.fixed_length)
        weight_of = {sequence.spans[0].key: weight for sequence, weight in zip(sequences, weights, strict=True)}
        sums = _Sums()
        computed_before = self.tokens_computed
        self.optimizer.zero_grad(set_to_none=True)
        for packed in pack(sequences, self._config.micro_batch_tokens):
            self._accumulate(packed, behavior, weight_of, sums)
        limit = self._config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        finite = math.isfinite(sums.loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.skipped_in_a_row = 0
            self._check_weights()
        else:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == 3:
                raise TrainingDiverged(
                    "three updates in a row held NaN or infinity; lower learner.lr, keep loss.delta above 0, "
                    "or train in float32 (model.trainer_dtype)"
                )
        self.optimizer.zero_grad(set_to_none=True)
        num_computed = self.tokens_computed - computed_before
        return _stats(sums, sum(lengths), num_computed, norm, skipped=not finite)

    def _check_weights(self) -> None:
        """Raise TrainingDiverged if the update left NaN or infinity in a weight: there is no way back from that."""
        trained = [parameter.detach() for group in self.optimizer.param_groups for parameter in group["params"]]
        largest = torch.stack(torch._foreach_norm(trained, math.inf))
        if not torch.isfinite(largest).all():
            raise TrainingDiverged(
                "an update left NaN or infinity in the weights; go on from the last checkpoint with a lower learner.lr"
            )

    def _accumulate(
        self,
        packed: Pack,
        behavior: Mapping[SpanKey, Sequence[float]],
        weight_of: Mapping[SpanKey, float],
        sums: _Sums,
    ) -> None:
        """Forward and backward of one micro-batch: its logits part by part, then the layers below at once."""
        hidden = self._hidden(self.model, packed)
        reference = None
        if self._loss.kl > 0 and any(sequence.held for sequence in packed.sequences):
            # on the same pack, so that the term is exactly 0 as long as the policy is the reference
            with torch.no_grad():
                reference = self._hidden(self._reference, packed)
        columns = _Columns.of(packed, behavior, weight_of, hidden)
        above = hidden.detach().requires_grad_()
        for part in self._parts(packed):
            self._add_up(part, above, reference, columns.at(part.tokens), sums)
        hidden.backward(above.grad)

    def _add_up(
        self, part: "_Part", hidden: Tensor, reference_hidden: Tensor | None, columns: "_Columns", sums: _Sums
    ) -> None:
        """The loss of some completion tokens, and its gradient down to ``hidden``."""
        loss = self._loss
        every = self._logprobs(self.model, hidden[part.places])
        logprobs = part.drawn(every)
        entropies = losses.entropy(every if loss.entropy > 0 else every.detach())[part.rows]
        current = logprobs.detach()
        kept = torch.ones_like(columns.maskable)
        if loss.delta > 0:
            kept = losses.probable_enough(logprobs, loss.delta) | ~columns.maskable
        # cut a dropped token off before the exponential: its ratio may be infinite, and 0 · inf is NaN
        denominators = torch.where(columns.has_behavior, columns.behavior, current)
        ratio = losses.importance_ratio(torch.where(kept, logprobs, current), denominators)
        policy, clipped = losses.clipped_policy_loss(
            ratio,
            columns.advantages,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
        )
        per_token = torch.where(kept, policy, torch.zeros_like(policy)) - loss.entropy * entropies
        if reference_hidden is not None:
            with torch.no_grad():
                reference = self._logprobs(self._reference, reference_hidden[part.places])
            if loss.kl_estimator == "exact":
                divergence = losses.divergence(every, reference)[part.rows]
            else:
                # a token that is not held is set to the policy's own before the exponential, as above
                expected = torch.where(columns.held, part.drawn(reference), logprobs.detach())
                divergence = losses.k3_divergence(logprobs, expected)
            divergence = torch.where(columns.held, divergence, torch.zeros_like(divergence))
            per_token = per_token + loss.kl * divergence
            sums.kl += float(divergence.detach().sum())
            sums.held += int(columns.held.sum())
        total = (per_token * columns.weights).sum()
        total.backward()
        sums.loss += float(total.detach())
        sums.entropy += float(entropies.detach().sum())
        sums.ratio += float(ratio.detach().sum())
        sums.ratio_max = max(sums.ratio_max, float(ratio.detach().max()))
        sums.clipped += float((clipped & kept).sum())
        sums.masked += float((~kept).sum())
        gaps = (current - columns.sampled).abs()[columns.was_sampled]
        if len(gaps):
            sums.gap += float(gaps.sum())
            sums.gap_tokens += len(gaps)
            sums.gap_max = max(sums.gap_max, float(gaps.max()))

    def _hidden(self, model: Any, packed: Pack) -> Tensor:
        """What the decoder gives at a pack's ``logit_positions``, [places, D]."""
        self.tokens_computed += len(packed.token_ids)
        keep = torch.tensor(packed.logit_positions, device=self._device)
        with self._autocast(), self._frozen.given(model, packed):
            found: Tensor = model.get_decoder()(**self._inputs(packed)).last_hidden_state[0, keep]
        return found

    def _logprobs(self, model: Any, hidden: Tensor) -> Tensor:
        """Log-probs of all tokens above the decoder, [n, D] → [n, V]."""
        return torch.log_softmax(self._logits(model, hidden), dim=-1)

    def _logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Logits / temperature above the decoder, [n, D] → [n, V], in float32 at least."""

        def known(*_: Any, **__: Any) -> Any:
            return BaseModelOutputWithPast(last_hidden_state=hidden[None])

        with self._autocast(), replaced([model.get_decoder()], known):
            logits: Tensor = model(use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self._temperature == 1 else logits / self._temperature

    def _parts(self, packed: Pack) -> "Iterator[_Part]":
        """A pack's completion tokens, so many at once as have `MOST_LOGITS` logits."""
        size = max(1, MOST_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(packed.logit_positions), size):
            places = slice(start, start + size)
            tokens = [n for n, row in enumerate(packed.logit_rows) if start <= row < start + size]
            rows = torch.tensor([packed.logit_rows[n] - start for n in tokens], device=self._device)
            targets = torch.tensor([packed.targets[n] for n in tokens], device=self._device)
            yield _Part(places=places, tokens=tokens, rows=rows, targets=targets)

    def _inputs(self, packed: Pack) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([packed.token_ids], device=self._device),
            "position_ids": torch.tensor([packed.position_ids], device=self._device),
            "use_cache": False,
            "attend": AttendSegments(packed.segments, self._device),
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._compute_dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._compute_dtype)


@dataclass(frozen=True)
class _Part:
    """Some completion tokens of a pack, ``tokens`` of [N], and the places whose logits they are drawn from."""

    places: slice  # of the pack's logit positions
    tokens: list[int]
    rows: Tensor  # of the places' logits, one a token
    targets: Tensor

    def drawn(self, logprobs: Tensor) -> Tensor:
        """Of all log-probs those of the tokens, [places, V] → [tokens]."""
        return logprobs[self.rows, self.targets]


@dataclass(frozen=True)
class _Columns:
    """What the loss needs beside the log-probs, one value a completion token, [N]."""

    advantages: Tensor
    behavior: Tensor
    has_behavior: Tensor  # False: the denominator is the current log-prob
    weights: Tensor
    maskable: Tensor
    held: Tensor  # the KL term counts
    sampled: Tensor
    was_sampled: Tensor  # False where the sampler saw another rendering

    @classmethod
    def of(
        cls,
        packed: Pack,
        behavior: Mapping[SpanKey, Sequence[float]],
        weight_of: Mapping[SpanKey, float],
        like: Tensor,
    ) -> "_Columns":
        """The columns of a pack, on the device of ``like`` and at least in float32."""
        advantages: list[float] = []
        weights: list[float] = []
        maskable: list[bool] = []
        held: list[bool] = []
        sampled: list[float] = []
        was_sampled: list[bool] = []
        denominators: list[float] = []
        has_behavior: list[bool] = []
        for sequence in packed.sequences:
            for span in sequence.spans:
                count = span.stop - span.start
                advantages += [span.advantage] * count
                weights += [weight_of[sequence.spans[0].key]] * count
                maskable += [sequence.masks_improbable] * count
                held += [sequence.held] * count
                sampled += span.sampler_logprobs or [0.0] * count
                was_sampled += [span.sampler_logprobs is not None] * count
                denominators += behavior.get(span.key, [0.0] * count)
                has_behavior += [span.key in behavior] * count
        options: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        return cls(
            advantages=torch.tensor(advantages, **options),
            behavior=torch.tensor(denominators, **options),
            has_behavior=torch.tensor(has_behavior, device=like.device),
            weights=torch.tensor(weights, **options),
            maskable=torch.tensor(maskable, device=like.device),
            held=torch.tensor(held, device=like.device),
            sampled=torch.tensor(sampled, **options),
            was_sampled=torch.tensor(was_sampled, device=like.device),
        )

    def at(self, tokens: Sequence[int]) -> "_Columns":
        chosen = torch.tensor(tokens, device=self.weights.device)
        return _Columns(**{column.name: getattr(self, column.name)[chosen] for column in fields(self)})


def _spans(packed: Pack) -> Iterator[Any]:
    for sequence in packed.sequences:
        yield from sequence.spans


def _stats(sums: _Sums, num_tokens: int, num_computed: int, norm: float, *, skipped: bool) -> UpdateStats:
    return UpdateStats(
        loss=sums.loss,
        entropy=sums.entropy / num_tokens,
        ratio_mean=sums.ratio / num_tokens,
        ratio_max=sums.ratio_max,
        clip_fraction=sums.clipped / num_tokens,
        masked_fraction=sums.masked / num_tokens,
        kl=sums.kl / sums.held if sums.held else 0.0,
        grad_norm=norm,
        num_tokens=num_tokens,
        num_held=sums.held,
        num_computed=num_computed,
        sampler_gap_mean=sums.gap / sums.gap_tokens if sums.gap_tokens else 0.0,
        sampler_gap_max=sums.gap_max,
        skipped=skipped,
    )


def learning_rate(config: LearnerConfig, index: int, total_steps: int) -> float:
    """Learning rate of training step ``index`` = 0, 1, …: linear warm-up, then constant, linear to 0 or cosine to 0.

    From ``total_steps`` on, linear and cosine stay at 0.
    """
    if index < config.warmup_steps:
        return config.lr * (index + 1) / config.warmup_steps
    progress = min((index - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr
