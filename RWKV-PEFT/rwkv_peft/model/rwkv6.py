"""RWKV-6 x060 with the public names, shapes and order of its parameters.

Letters: B batch, T tokens, C n_embd, A dim_att, F dim_ffn, H heads, N head size, V vocabulary.
Parameters are registered in RWKV-LM's order, since the `rwkv` package reads the head count off it.
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
"""1e-5 x head_size_divisor^2, with RWKV-LM's divisor of 8."""


class Linear(nn.Linear):
    """A bias-free linear layer whose weight may be wider than its input (fp32 master weights under bf16)."""

    plain_product = True
    """Its forward is its own, but does no more than the product: an adapter may take its place."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Weights are loaded, or initialised by init.py: nothing to do here."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the input's dtype; its statistics are fp32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class TimeMix(nn.Module):
    """Attention's counterpart: data-dependent token shift, five projections, the WKV6 recurrence, gate."""

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
        self.register_parameter("time_state", None)  # (H, N, N), [value][key]: what every text begins with
        self.receptance = Linear(c, a)
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.output = Linear(a, c)
        self.gate = Linear(c, a)
        self.ln_x = nn.GroupNorm(config.n_head, a, eps=LN_X_EPS)

    def forward(
        self, x: Tensor, shift: Tensor, wkv_state: Tensor | None, starts: Tensor | None = None, in_place: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), wkv_state (B, H, N, N), starts (B, T) -> (y (B, T, C), shift, wkv_state).

        Without a wkv_state a text begins, with the tuned state where there is one. `in_place` (T = 1, no gradients)
        writes the new wkv_state over the old one.
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
        """The inputs of decay, key, value, receptance and gate, each (B, T, C)."""
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        amounts = torch.cat(maa).flatten(1)  # (5, C)
        return ddlerp(x, shift, self.time_maa_x.flatten(), self.time_maa_w1, amounts, self.time_maa_w2, starts)

    def _decay(self, xw: Tensor) -> Tensor:
        """w of exp(-exp(w)), (B, T, A), in fp32 or wider."""
        return decay(xw, self.time_decay.flatten(), self.time_decay_w1, self.time_decay_w2)


def _last(x: Tensor) -> Tensor:
    """The last token's, (B, C), of x (B, T, C), in memory of its own: a state must not keep all of x alive."""
    return x[:, -1].clone()


class ChannelMix(nn.Module):
    """The feed-forward layer: squared ReLU, gated by a receptance, on a token shift."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.receptance = Linear(config.n_embd, config.n_embd)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, shift: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C), starts (B, T) -> (y (B, T, C), shift)."""
        xk, xr = shift_lerp(x, shift, torch.cat((self.time_maa_k, self.time_maa_r)).flatten(1), starts)
        k = self.key(xk)  # (B, T, F)
        r = self.receptance(xr)  # (B, T, C)
        return torch.sigmoid(r) * self.value(relu_square(k)), _last(x)


class Block(nn.Module):
    """Time-mix and channel-mix with pre-norm residuals; the first block also normalises the embedding."""

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
        """x (B, T, C), starts (B, T) -> (x, state after the last token). `in_place` as in TimeMix."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, att_shift, wkv = self.att(self.ln1(x), state.att_shift, state.wkv, starts, in_place)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, starts)
        return x + y, LayerState(att_shift, wkv, ffn_shift)


class RWKV6(nn.Module):
    """The language model: token ids (B, T) -> logits (B, T, V), and the state after them.

    Args:
        config: resolved shape.
        dtype: of the activations; parameters may be wider.
        grad_cp: recompute every block in the backward pass.
        wkv_backend: see ops.wkv6.
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
        self.register_parameter("prompt", None)  # (P, C), vectors that every text begins with (peft/methods/prompt.py)

    def forward(self, ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """ids (B, T) int64 -> (logits (B, T, V) in the activations' dtype, state). T >= 1, any batch."""
        x, state = self.hidden(ids, state)
        return self.head(x), state

    @torch.no_grad()
    def step(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """`forward` for the next token of a text being generated: ids (B, 1), and `state` is used up.

        Its memory becomes the new state's: of the old one nothing may be read again. Give it a state that an earlier
        forward or step returned, and keep no other reference.
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
        """The head's input, (B, T, C), and the state. Without a state, the text begins with the prompt.

        Args:
            ids: (B, T) int64.
            state: before the first token; None is that of an empty text.
            starts: (B, T) bool, for rows of several texts: set where one begins, which then sees nothing of what is
                before it, `state` included. The output before a start is not that of the text alone (`wkv6` has the
                reason): leave it out of the loss, as its target is the first token of another text.
        Raises:
            ValueError: starts does not fit ids, or the model has a prompt or a tuned state, which only the first of
                several texts would begin with.
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
                # Reentrant checkpointing trains silently wrong below a frozen embedding.
                x, layer_state = checkpoint(block, x, before, starts, use_reentrant=False)
            else:
                x, layer_state = block(x, before, starts)
            after.append(layer_state)
        return self.ln_out(x[:, prompt_length:]), after

    def _check_starts(self, ids: Tensor, starts: Tensor) -> None:
        if starts.shape != ids.shape or starts.dtype != torch.bool:
            raise ValueError(f"starts must be bool {tuple(ids.shape)}; found {starts.dtype} {tuple(starts.shape)}")
        if self.prompt is not None:
            raise ValueError("a row of several texts cannot have the prompt before each: give each a row of its own")
        if self.has_time_state:
            raise ValueError("several texts in a row cannot each begin with the tuned state: give each its own row")

    @property
    def has_time_state(self) -> bool:
        """Whether texts begin with a state that state tuning learned."""
        return self.blocks[0].att.time_state is not None

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Mean loss over the trained tokens, L2Wrap included: hidden (B, T, C), targets and mask (B, T) -> scalar."""
        if isinstance(self.head, nn.Linear):
            return linear_cross_entropy(hidden, self.head.weight, targets, mask)
        return head_cross_entropy(hidden, self.head, targets, mask)
