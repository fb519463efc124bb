"""Sampling as the released samplers of VAR, M-VAR and Markov MVAR do it, in plain code over our modules' weights.

What they do and ours does not: Mamba runs over all tokens so far at every scale, from kept inputs; keys and values are
concatenated at every scale; windows are dense masks; the modulation is projected anew in every block at every scale; all
logits are sorted; images are decoded in float32, all at once. What a CPU lacks of their kernels stands in its usual plain form:
fused attention is PyTorch's, mamba_ssm's scan is the chunked form of its paper (arXiv 2405.21060, section 6).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Attention, window_mask
from models.autoencoder import Decoder, PixelAttention, ResidualBlock
from models.generate import SamplingConfig
from models.ssm import Mamba2
from models.tokenizer import VQVAE
from models.transformer import Block, ScaleTransformer

SCAN_CHUNK = 64


class ReleasedSampler:
    """labels (B,) and a generator -> K index tensors (B, h_k * w_k) and the sum of codes (B, code_dim, h_K, w_K)."""

    def __init__(self, transformer: ScaleTransformer, tokenizer: VQVAE, config: SamplingConfig):
        self.transformer, self.quantizer, self.config = transformer, tokenizer.quantizer, config
        self.masks = window_masks(transformer)

    @torch.no_grad()
    def __call__(self, labels: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        model, pyramid, batch = self.transformer, self.transformer.pyramid, len(labels)
        embedding = model.class_embed(torch.cat([labels, torch.full_like(labels, model.unconditional)]))  # (2B, C)
        places = model.scale_embed(model.scale_ids) + model.position_embed  # (1, L, C)
        x = embedding.unsqueeze(1) + model.start_embed + places[:, : pyramid.lengths[0]]
        f_hat = self.quantizer.initial(batch)
        caches = [BlockCache() for _ in model.blocks]
        indices = []
        for k in pyramid.scales:
            for block, cache in zip(model.blocks, caches, strict=True):
                x = cache.advance(block, x, self._modulation(block, embedding), self.masks.get((block, k)))
            logits = self._logits(x, embedding)
            strength = self.config.guidance_scale * k / max(pyramid.num_scales - 1, 1)
            logits = (1 + strength) * logits[:batch] - strength * logits[batch:]
            indices.append(draw(logits, self.config.top_k, self.config.top_p, generator))
            f_hat = self.quantizer.add_scale(f_hat, k, self.quantizer.codebook(indices[k]))
            if k + 1 < pyramid.num_scales:
                x = model.code_embed(self.quantizer.next_input(f_hat, k)) + places[:, pyramid.tokens(range(k + 1, k + 2))]
                x = x.repeat(2, 1, 1)
        return indices, f_hat

    def _modulation(self, block: Block, embedding: Tensor) -> Tensor:
        """(2B, C) -> (2B, 3 * S, 1, C): all gammas, all scales, all shifts."""
        source = self.transformer.shared_modulation(embedding) if self.transformer.config.shared_modulation else embedding
        return block.modulation(source).unflatten(-1, (3 * block.num_sublayers, 1, -1))

    def _logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.transformer.head_modulation(embedding).unsqueeze(1).chunk(2, dim=-1)
        return self.transformer.head(normalized(x, scale, shift))


class BlockCache:
    """What one block keeps from scale to scale: keys and values of VAR, all inputs of Mamba in M-VAR."""

    def __init__(self):
        self.keys = self.values = self.mamba_inputs = None

    def advance(self, block: Block, x: Tensor, modulation: Tensor, mask: Tensor | None) -> Tensor:
        """x (2B, l, C) of one scale, modulation (2B, 3 * S, 1, C) -> (2B, l, C)"""
        gammas, scales, shifts = (part.unbind(1) for part in modulation.chunk(3, dim=1))
        x = x + self.attention(block.mixers[0], normalized(x, scales[0], shifts[0]), mask) * gammas[0]
        if len(block.mixers) > 1:
            x = x + self.mamba(block.mixers[1], x, gammas[1], scales[1], shifts[1])
        hidden = F.gelu(block.ffn.fc1(normalized(x, scales[-1], shifts[-1])), approximate="tanh")
        return x + block.ffn.fc2(hidden) * gammas[-1]

    def attention(self, mixer: Attention, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = torch.cat([mixer.q_bias, torch.zeros_like(mixer.q_bias), mixer.v_bias])
        qkv = F.linear(x, mixer.qkv.weight, bias).unflatten(-1, (3, mixer.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (2B, H, l, D) each
        if mixer.normalize:
            q = F.normalize(q, dim=-1) * mixer.log_scale.clamp(max=math.log(100)).exp()
            k = F.normalize(k, dim=-1)
        if mixer.history:
            k = self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
            v = self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
        scale = 1.0 if mixer.normalize else 0.25 / math.sqrt(q.shape[-1])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return mixer.proj(y.transpose(1, 2).flatten(2))

    def mamba(self, mixer: Mamba2, x: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The last l tokens of Mamba over all inputs so far."""
        so_far = x if self.mamba_inputs is None else torch.cat([self.mamba_inputs, x], dim=1)
        self.mamba_inputs = so_far
        return (whole_mamba(mixer, normalized(so_far, scale, shift)) * gamma)[:, -x.shape[1] :]


def whole_mamba(mixer: Mamba2, x: Tensor) -> Tensor:
    """Mamba-2 over a sequence from its start: (B, L, C) -> (B, L, C)."""
    ssm, length = mixer.ssm, x.shape[1]
    z, xBC, dt = mixer.in_proj(x).split([ssm.inner, ssm.conv_dim, ssm.heads], dim=-1)
    conv = F.conv1d(xBC.transpose(1, 2), ssm.conv1d.weight, ssm.conv1d.bias, padding=ssm.d_conv - 1, groups=ssm.conv_dim)
    xBC = F.silu(conv[..., :length].transpose(1, 2))
    inner, B, C = xBC.split([ssm.inner, ssm.state_dim, ssm.state_dim], dim=-1)
    inner = inner.unflatten(-1, (ssm.heads, ssm.head_dim))  # (B, L, H, P)
    y = chunked_scan(inner, F.softplus(dt + ssm.dt_bias), -ssm.A_log.exp(), B, C) + inner * ssm.D.view(-1, 1)
    y = y.flatten(2) * F.silu(z)
    return mixer.out_proj(y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-5) * ssm.norm.weight)


def chunked_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """x (batch, L, H, P), dt (batch, L, H), A (H,), B and C (batch, L, N) -> (batch, L, H, P), in chunks of 64."""
    length = x.shape[1]
    padding = -length % SCAN_CHUNK
    x, dt = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(dt, (0, 0, 0, padding))
    B, C = F.pad(B, (0, 0, 0, padding)), F.pad(C, (0, 0, 0, padding))
    x = (x * dt.unsqueeze(-1)).unflatten(1, (-1, SCAN_CHUNK)).transpose(2, 3)  # (batch, n, H, Q, P)
    decay = (dt * A).unflatten(1, (-1, SCAN_CHUNK)).transpose(2, 3).cumsum(dim=-1)  # (batch, n, H, Q)
    B, C = (part.unflatten(1, (-1, SCAN_CHUNK)).unsqueeze(2) for part in (B, C))  # (batch, n, 1, Q, N)

    later = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool, device=x.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()  # (batch, n, H, Q, Q)
    y = (C @ B.transpose(-1, -2) * between) @ x
    added = (x * (decay[..., -1:] - decay).exp().unsqueeze(-1)).transpose(-1, -2) @ B  # (batch, n, H, P, N)
    state, before = torch.zeros_like(added[:, 0]), []
    for n in range(added.shape[1]):
        before.append(state)
        state = state * decay[:, n, :, -1].exp()[..., None, None] + added[:, n]
    y = y + (C @ torch.stack(before, dim=1).transpose(-1, -2)) * decay.exp().unsqueeze(-1)
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def normalized(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def draw(logits: Tensor, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """(B, l, V) -> (B, l)"""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    probabilities = logits.softmax(dim=-1).flatten(0, 1)
    return torch.multinomial(probabilities, 1, replacement=True, generator=generator).view(logits.shape[:2])


def window_masks(transformer: ScaleTransformer) -> dict[tuple[Block, int], Tensor]:
    """Dense masks (h * w, h * w) of the scales with windows, by block and scale."""
    config, device = transformer.config, transformer.head.weight.device
    masks = {}
    for block, kind in zip(transformer.blocks, config.blocks, strict=True):
        for k in config.windowed_scales(kind):
            masks[block, k] = window_mask(*config.pyramid.shapes[k], config.window).to(device)
    return masks


@torch.no_grad()
def decode(tokenizer: VQVAE, f_hat: Tensor) -> Tensor:
    """Sum of codes (B, code_dim, h, w) -> images (B, 3, H, W) in [0, 1]."""
    decoder: Decoder = tokenizer.decoder
    x = decoder.conv_in(tokenizer.after_quantizer(f_hat))
    for module in decoder.middle:
        x = decode_part(module, x)
    for level in decoder.levels:
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            x = decode_part(attention, decode_part(block, x))
        if level is not decoder.levels[-1]:
            x = level.resample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    return decoder.conv_out(F.silu(decoder.norm_out(x))).clamp(-1, 1).add(1).mul(0.5)


def decode_part(module: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, ResidualBlock):
        h = module.conv1(F.silu(module.norm1(x)))
        return module.shortcut(x) + module.conv2(F.silu(module.norm2(h)))
    return module(x) if isinstance(module, PixelAttention) else x
