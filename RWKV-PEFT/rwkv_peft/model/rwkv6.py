"""RWKV-6 (x060). Names, shapes and order of the parameters are those of RWKV-LM.

Letters: B batch, T tokens, C n_embd, A dim_att, F dim_ffn, H heads, N head size, V vocabulary.
The order matters: the `rwkv` package derives the number of heads from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.model.state import LayerState, ModelState, first_state
from rwkv_peft.ops.cross_entropy import head_cross_entropy, linear_cross_entropy
from rwkv_peft.ops.mix.op import ddlerp, decay, gated_norm, relu_square, shift_lerp
from rwkv_peft.ops.products import linear
from rwkv_peft.ops.wkv6.op import wkv6, wkv6_step

LN_X_EPS = 64e-5
"""Epsilon of the GroupNorm ln_x: 1e-5 x head_size_divisor^2, with RWKV-LM's divisor of 8."""


class Linear(nn.Linear):
    """A linear layer without bias, whose weight may be wider than its input (fp32 master weights under bf16)."""

    plain_product = True
    """Tells `peft` that this class's own `forward` computes only the product, so an adapter may replace the layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: init.py loads or initializes the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with results in the input's dtype; statistics are computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class TimeMix(nn.Module):
    """The counterpart of attention: data-dependent token shift, five projections, the WKV6 recurrence, and a gate."""

    def __init__(self, config: ModelConfig, wkv_backend: str = "auto") -> None:
        super().__init__()
        c, a = config.n_embd, config.dim_att
        self.n_head, self.head_size, self.wkv_backend = config.n_head, config.head_size, wkv_backend
        for name in ("x", "w", "k", "v", "r", "g"):
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, c)))
        self.time_maa_w1 = nn.Parameter(torch.empty(c, 5 * config.time_mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.time_mix_rank, c))
        self.time_decay = nn.Parameter(torch.empty(1, 1, a))
        self.time_decay_w1 = nn.Parameter(torch.empty(c, config.time_decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.time_decay_rank, a))
        self.time_faaaa = nn.Parameter(torch.empty(config.n_head, config.head_size))
        self.register_parameter("time_state", None)  # (H, N, N), [value][key]: tuned initial state
        self.receptance = Linear(c, a)
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.output = Linear(a, c)
        self.gate = Linear(c, a)
        self.ln_x = nn.GroupNorm(config.n_head, a, eps=LN_X_EPS)

    def forward(
        self, x: Tensor, shift: Tensor, wkv_state: Tensor | None, starts: Tensor | None = None, in_place: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (y (B, T, C), shift, wkv_state).

        Args:
            x: (B, T, C).
            shift: (B, C), the input of the token before x.
            wkv_state: (B, H, N, N); None at the beginning of a text, which uses the tuned initial state if it exists.
            starts: (B, T) bool; see `RWKV6.hidden`.
            in_place: overwrite wkv_state with the new state (T = 1, no gradients).
        """
        if wkv_state is None and self.time_state is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            wkv_state = self.time_state.to(wide).mT.expand(x.shape[0], -1, -1, -1)
        heads = (self.n_head, self.head_size)
        xw, xk, xv, xr, xg = self._mix(x, shift, starts)
        r = self.receptance(xr).unflatten(-1, heads)  # (B, T, H, N)
        k = self.key(xk).unflatten(-1, heads)
        v = self.value(xv).unflatten(-1, heads)
        w = self._decay(xw).unflatten(-1, heads)
        if in_place:
            y = wkv6_step(r, k, v, w, self.time_faaaa, wkv_state, backend=self.wkv_backend)
        else:
            y, wkv_state = wkv6(r, k, v, w, self.time_faaaa, wkv_state, starts=starts, backend=self.wkv_backend)
        norm = self.ln_x
        y = gated_norm(y.flatten(-2), self.gate(xg), norm.weight, norm.bias, norm.num_groups, norm.eps)  # (B, T, A)
        return self.output(y), _last(x), wkv_state

    def _mix(self, x: Tensor, shift: Tensor, starts: Tensor | None) -> tuple[Tensor, ...]:
        """Return the inputs of decay, key, value, receptance and gate, each (B, T, C)."""
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        amounts = torch.cat(maa).flatten(1)  # (5, C)
        return ddlerp(x, shift, self.time_maa_x.flatten(), self.time_maa_w1, amounts, self.time_maa_w2, starts)

    def _decay(self, xw: Tensor) -> Tensor:
        """Return w, (B, T, A), of the decay exp(-exp(w)), in fp32 or wider."""
        return decay(xw, self.time_decay.flatten(), self.time_decay_w1, self.time_decay_w2)


def _last(x: Tensor) -> Tensor:
    """Return the last token of x (B, T, C) as (B, C). A copy, so that a state does not keep all of x in memory."""
    return x[:, -1].clone()


class ChannelMix(nn.Module):
    """The feed-forward layer: token shift, squared ReLU, and a receptance gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.receptance = Linear(config.n_embd, config.n_embd)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, shift: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y (B, T, C), shift); x is (B, T, C), shift (B, C), starts (B, T)."""
        xk, xr = shift_lerp(x, shift, torch.cat((self.time_maa_k, self.time_maa_r)).flatten(1), starts)
        k = self.key(xk)  # (B, T, F)
        r = self.receptance(xr)  # (B, T, C)
        return torch.sigmoid(r) * self.value(relu_square(k)), _last(x)


class Block(nn.Module):
    """Time-mix and channel-mix with pre-norm residuals. The first block also normalizes the embedding."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str = "auto") -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.n_embd)
        self.ln2 = LayerNorm(config.n_embd)
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd)
        self.att = TimeMix(config, wkv_backend)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: LayerState, starts: Tensor | None = None, in_place: bool = False
    ) -> tuple[Tensor, LayerState]:
        """Return (x, state after the last token); x is (B, T, C), starts (B, T). `in_place` as in TimeMix."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, att_shift, wkv = self.att(self.ln1(x), state.att_shift, state.wkv, starts, in_place)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, starts)
        return x + y, LayerState(att_shift, wkv, ffn_shift)


class RWKV6(nn.Module):
    """The language model: maps token ids (B, T) to logits (B, T, V) and the state after the last token.

    Args:
        config: resolved shape.
        dtype: dtype of the activations; parameters may have a wider one.
        grad_cp: recompute every block in the backward pass (gradient checkpointing).
        wkv_backend: one of `ops.wkv6.op.BACKENDS`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        grad_cp: bool = False,
        wkv_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.grad_cp = config, dtype, grad_cp
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer, wkv_backend) for layer in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.register_parameter("prompt", None)  # (P, C), a tuned prefix of every text (peft/methods/prompt.py)

    def forward(self, ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Return (logits (B, T, V) in the activations' dtype, state) for ids (B, T) int64 with T >= 1."""
        x, state = self.hidden(ids, state)
        return self.head(x), state

    @torch.no_grad()
    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Compute `forward` for one more token, ids (B, 1), and overwrite `state`, as in generation. No gradients.

        The new state reuses the memory of the old one, so do not read the old state again. Pass a state that an earlier
        `forward` or `step` returned, and keep no other reference to it.
        """
        x = self.emb(ids).to(self.dtype)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, layer_state = block(x, before, in_place=True)
            after.append(layer_state)
        return self.head(self.ln_out(x)), after

    def hidden(
        self, ids: Tensor, state: ModelState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Return the head's input, (B, T, C), and the state after the last token.

        Args:
            ids: (B, T) int64.
            state: the state before the first token. None means the beginning of a text, with the tuned prompt or the
                tuned initial state if the model has one.
            starts: (B, T) bool, for rows that hold several texts: True for the first token of a text. A text does not
                depend on the tokens before its start, nor on `state`. The last token of each text has a different
                output than without packing (see `wkv6`). Its target is the first token of the next text, so exclude it
                from the loss.
        Raises:
            ValueError: starts does not match ids, or the model has a tuned prompt or a tuned initial state, which only
                the first text of each row would use.
        """
        if starts is not None:
            self._check_starts(ids, starts)
        x, prompt_length = self.emb(ids).to(self.dtype), 0
        if state is None:
            state = first_state(self.config, ids.shape[0], x.device, x.dtype)
            if self.prompt is not None:
                prompt_length = self.prompt.shape[0]
                x = torch.cat((self.prompt.to(x.dtype).expand(ids.shape[0], -1, -1), x), dim=1)  # (B, P + T, C)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                # With a frozen embedding, reentrant checkpointing gives wrong gradients without an error.
                x, layer_state = checkpoint(block, x, before, starts, use_reentrant=False)
            else:
                x, layer_state = block(x, before, starts)
            after.append(layer_state)
        return self.ln_out(x[:, prompt_length:]), after

    def _check_starts(self, ids: Tensor, starts: Tensor) -> None:
        if starts.shape != ids.shape or starts.dtype != torch.bool:
            raise ValueError(f"starts must be bool {tuple(ids.shape)}; found {starts.dtype} {tuple(starts.shape)}")
        if self.prompt is not None:
            raise ValueError("a tuned prompt cannot be used with several texts in a row; use one text per row")
        if self.has_time_state:
            raise ValueError("a tuned initial state cannot be used with several texts in a row; use one text per row")

    @property
    def has_time_state(self) -> bool:
        """Whether the model has a tuned initial state (state tuning)."""
        return self.blocks[0].att.time_state is not None

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the mean loss over the tokens in the mask, including L2Wrap's gradient.

        hidden is (B, T, C), targets (B, T) int64, mask (B, T) bool; the result is a scalar.
        """
        if isinstance(self.head, nn.Linear):
            return linear_cross_entropy(hidden, self.head.weight, targets, mask)
        return head_cross_entropy(hidden, self.head, targets, mask)
