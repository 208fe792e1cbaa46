"""The building blocks of a Vision Transformer, with the field's parameter names. MAE calls these and the ops, nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _torch, dispatch, ops
from .ops.linear import Products, bias_gradient, input_gradient, native_products, product, weight_gradient
from .reference import pair


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x (N, T, D), ids (N, K) -> (N, K, D). As rows of one matrix: a gather along dim 1 is 4 to 10 times slower on the CPU."""
    N, T, D = x.shape
    rows = ids + T * torch.arange(N, device=ids.device)[:, None]
    return x.reshape(N * T, D).index_select(0, rows.flatten()).view(N, ids.shape[1], D)


class RepeatedTokens(NamedTuple):
    """The decoder's input (N, 1+L, D) with each distinct token once: at one position the mask token is the same in every sample
    (He et al. 2022, section 3), so what a token alone decides need not be computed for each.

    rows         (N (1+K) + L, D)  class token and kept tokens of each sample, shuffled; then the mask token at each position
    ids_restore  (N, L)            int64, the rank of each patch; rank < K means kept
    """

    rows: Tensor
    ids_restore: Tensor

    @classmethod
    def of(cls, x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> "RepeatedTokens":
        """Of the arguments of ops.unshuffle."""
        token = _unshuffled(ids_restore, x.shape[1] - 1)
        rows = (x + F.embedding(token, pos_embed[0])).flatten(0, 1)
        return cls(torch.cat([rows, (mask_token + pos_embed[:, 1:])[0]]), ids_restore)

    def len_keep(self) -> int:  # Dynamo of torch 2.10 sees through methods of a named tuple, not through properties
        N, L = self.ids_restore.shape
        return (self.rows.shape[0] - L) // N - 1

    def expanded(self, y: Tensor) -> Tensor:
        """Values of the rows, (N (1+K) + L, C) -> those of the tokens, (N, 1+L, C)."""
        (N, L), K = self.ids_restore.shape, self.len_keep()
        first = (1 + K) * torch.arange(N, device=y.device)[:, None]  # row of each sample
        mask_token = N * (1 + K) + torch.arange(L, device=y.device)
        row = torch.where(self.ids_restore < K, first + 1 + self.ids_restore, mask_token)
        return y.index_select(0, torch.cat([first, row], dim=1).flatten()).view(N, 1 + L, y.shape[1])

    def summed(self, dy: Tensor) -> Tensor:
        """Gradients of the tokens, (N, 1+L, C) -> those of the rows, (N (1+K) + L, C): sums in fp32 and a fixed order, rounded
        once."""
        K = self.len_keep()
        kept = take_tokens(dy, _unshuffled(self.ids_restore, K)).flatten(0, 1)
        removed = (self.ids_restore >= K).to(dy.dtype).t()[:, None]
        return torch.cat([kept, torch.bmm(removed, dy[:, 1:].transpose(0, 1))[:, 0]])


def _unshuffled(ids_restore: Tensor, len_keep: int) -> Tensor:
    """(N, 1+K): the token of the image that the class token and each kept token are."""
    return F.pad(1 + ids_restore.argsort(dim=1)[:, :len_keep], (1, 0))


class Linear(nn.Linear):
    """nn.Linear on the fastest GEMM of the machine."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Patches to tokens. Only the patches that are asked for are read from the image and multiplied.

    `proj` is a Conv2d for the sake of its parameters' names, shapes and initialisation; it runs as one GEMM. Where it is hooked,
    sharded or replaced it is called, each patch an image of its own.
    """

    def __init__(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int], in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size, "img_size"), pair(patch_size, "patch_size")
        (H, W), (ph, pw) = self.img_size, self.patch_size
        if H % ph or W % pw:
            raise ValueError(f"img_size must be a multiple of patch_size; {H} x {W} is no multiple of {ph} x {pw}")
        self.grid_size = (H // ph, W // pw)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size)

    def forward(
        self,
        imgs: Tensor,
        ids: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        any_size: bool = False,
        patches: Tensor | None = None,
    ) -> Tensor:
        """imgs (N, C, H, W), ids (N, K) or None for all patches in row-major order -> (N, K or L, D), no positions added.

        uint8 images are read as (x/255 - mean)/std. any_size: H and W are any multiples of the patch. patches (N, K, P): those of
        ids, where they have been read already.
        """
        self.check(imgs, any_size)
        weight = self.proj.weight
        dtype = dispatch.compute_dtype(weight)
        if patches is None:
            if ids is None:
                rows, cols = self.grid_of(imgs)
                ids = torch.arange(rows * cols, device=imgs.device).expand(imgs.shape[0], -1)
            patches = ops.gather_patches(imgs, ids, self.patch_size, mean, std, dtype)
        patches = patches.to(dtype)  # those that were read outside of here, where a sharded weight may have another
        if is_plain(self.proj, nn.Conv2d):
            return ops.linear(patches, weight.flatten(1), self.proj.bias)
        windows = patches.flatten(0, 1).unflatten(1, (self.proj.in_channels, *self.patch_size))
        return self.proj(windows)[..., 0, 0].unflatten(0, patches.shape[:2])

    def masked(
        self, imgs: Tensor, noise: Tensor, len_keep: int, mean: Tensor | None, std: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, K, D) of the patches that random masking keeps, then ids_keep, ids_restore, mask. Ranking the noise and reading the
        patches are one launch where both are native on a GPU."""
        if imgs.device.type == "cuda":
            self.check(imgs)
            dtype = dispatch.compute_dtype(self.proj.weight)
            inputs = {"imgs": imgs, "out": imgs.new_empty(0, dtype=dtype)}
            choices = {dispatch.choose("random_masking", {"noise": noise}), dispatch.choose("gather_patches", inputs)}
            if choices == {"native"}:
                options = (*self.patch_size, mean, std, dtype)
                patches, *masking = torch.ops.maefast.mask_patches_fwd(imgs, noise, len_keep, *options)
                return self(imgs, patches=patches), *masking
        ids_keep, *masking = ops.random_masking(noise, len_keep)
        return self(imgs, ids_keep, mean, std), ids_keep, *masking

    def grid_of(self, imgs: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in imgs (N, C, H, W)."""
        return imgs.shape[2] // self.patch_size[0], imgs.shape[3] // self.patch_size[1]

    def check(self, imgs: Tensor, any_size: bool = False) -> None:
        """Raises ValueError unless imgs is (N, C, H, W) of this embedding's channels and size; any_size: of whole patches."""
        (H, W), (ph, pw), C = self.img_size, self.patch_size, self.proj.in_channels
        fits = imgs.dim() == 4 and imgs.shape[1] == C
        if any_size:
            size = f"H, W), H a multiple of {ph} and W of {pw}"
            fits = fits and all(side and side % patch == 0 for side, patch in zip(imgs.shape[2:], self.patch_size, strict=True))
        else:
            size = f"{H}, {W})"
            fits = fits and imgs.shape[2:] == self.img_size
        if not fits:
            raise ValueError(f"imgs must be (N, {C}, {size}; its shape is {tuple(imgs.shape)}")


def drop_path(y: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al. 2016) on a residual branch y (N, ...): each sample becomes 0 with probability `rate`, else
    y / (1 - rate). The draw is that of torch.empty(N, ...).bernoulli_(1 - rate)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    kept = torch.empty(y.shape[0], *[1] * (y.dim() - 1), dtype=wide, device=y.device).bernoulli_(1 - rate)
    return (y * (kept / (1 - rate))).to(y.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence; x (N, T, D) -> (N, T, D). `drop`: dropout after the projection;
    `backend`: that of ops.attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, drop: float = 0.0, *, backend: str = "auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of num_heads; {dim} is no multiple of {num_heads}")
        dispatch.check_attention_backend(backend, "attn_backend")
        self.num_heads, self.drop, self.backend = num_heads, drop, backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        attended = ops.attention(self.qkv(x), self.num_heads, backend=self.backend)
        return F.dropout(self.proj(attended), self.drop, self.training)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), exact erf GELU. `drop`: dropout after GELU and after fc2."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.drop = drop
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(ops.bias_gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(hidden), self.drop, self.training)


class Block(nn.Module):
    """A pre-norm transformer block; x (N, T, D) -> (N, T, D). In training, `drop` and `drop_path` are the rates of dropout and of
    stochastic depth on both branches. `attn_backend` is the `backend` of its attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        *,
        attn_backend: str = "auto",
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, drop, backend=attn_backend)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, ids: Tensor | None = None, repeated: RepeatedTokens | None = None) -> Tensor:
        """The whole block; with ids (N, M) of tokens (N, M, D): what the block makes of these, and nothing else computed.

        repeated: x again. A fused block then computes norm1 and qkv once for each of its rows; their gradient goes to the rows,
        that of the residual stream to x.
        """
        parts = self._plain_parts()
        if parts is not None:
            if ids is not None and not self._takes_queries(x):
                return take_tokens(self.forward(x), ids)
            (norms, attention), drops = self._backends(parts, x), self._drops_paths()
            if ids is None and not drops and norms == {"native"} and attention == "native":
                return self._fused(parts, x, repeated)
            if ids is not None or drops or norms - {"eager"}:
                return self._of_ops(parts, x, ids)
        x = x + self._branch(self.attn(self.norm1(x)))
        x = x + self._branch(self.mlp(self.norm2(x)))
        return x if ids is None else take_tokens(x, ids)

    def _drops_paths(self) -> bool:
        return self.training and self.drop_path > 0

    def _branch(self, y: Tensor) -> Tensor:
        return drop_path(y, self.drop_path) if self._drops_paths() else y

    def is_fused(self, x: Tensor) -> bool:
        """Whether a call on x, without ids, runs as one Function."""
        parts = self._plain_parts()
        return parts is not None and not self._drops_paths() and self._backends(parts, x) == ({"native"}, "native")

    def _plain_parts(self) -> "_Parts | None":
        """The modules that hold the parameters, unless one of them is not what this file and nn.LayerNorm make of it."""
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        if not (
            is_plain(norm1, nn.LayerNorm) and is_plain(norm2, nn.LayerNorm) and is_plain(attn, Attention) and is_plain(mlp, Mlp)
        ):
            return None
        parts = _Parts(norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2)
        if not all(is_plain(linear, Linear) for linear in parts.linears()):
            return None
        if (attn.training and attn.drop) or (mlp.training and mlp.drop):
            return None
        return None if any(part.weight is None or part.bias is None for part in parts) else parts

    def _backends(self, parts: "_Parts", x: Tensor) -> tuple[set[str], str | None]:
        """Those that its norms and GELU run on, and that of attention; none where products take parameters of other dtypes."""
        if not dispatch.is_autocast(x) and any(linear.weight.dtype != x.dtype for linear in parts.linears()):
            return set(), None
        out = x.new_empty(0, dtype=dispatch.compute_dtype(x))
        inputs = {"x": x, "weight": parts.norm1.weight, "bias": parts.norm1.bias, "out": out}
        norms = {dispatch.choose(op, inputs) for op in ("layer_norm", "add_layer_norm", "bias_gelu")}
        return norms, dispatch.choose("attention", {"qkv": self._like_qkv(x, 3)}, self._head_width(x), self.attn.backend)

    def _takes_queries(self, x: Tensor) -> bool:
        """Whether the attention that was asked for, if any was, takes queries of some tokens alone."""
        inputs = {"qkv": self._like_qkv(x, 2), "q": self._like_qkv(x, 1)}
        requested = dispatch.request_for("attention", inputs, self.attn.backend)
        return requested is None or dispatch.can_run("attention", requested, inputs, self._head_width(x)) is None

    def _head_width(self, x: Tensor) -> int:
        return x.shape[2] // self.attn.num_heads

    @staticmethod
    def _like_qkv(x: Tensor, parts: int) -> Tensor:
        """As many of queries, keys and values of x as `parts`, of no sample: for dispatch."""
        return x.new_empty(0, x.shape[1], parts * x.shape[2], dtype=dispatch.compute_dtype(x))

    def _fused(self, parts: "_Parts", x: Tensor, repeated: RepeatedTokens | None) -> Tensor:
        dtype = dispatch.compute_dtype(x)
        native = native_products({"x": x}, dtype)
        options = _Options(self.attn.num_heads, parts.norm1.eps, parts.norm2.eps, dtype, native)
        parameters = [p for part in parts for p in (part.weight, part.bias)]
        rows, ids_restore = repeated or (None, None)
        if torch.is_grad_enabled():
            return _Block.apply(options, x, rows, ids_restore, *parameters)
        return _block_inference(options, x, repeated, *parameters)

    def _of_ops(self, parts: "_Parts", x: Tensor, ids: Tensor | None) -> Tensor:
        """The block as ops with gradients of their own. With ids (N, M): keys and values of every token; queries, projection and
        MLP of those in ids alone."""
        norm1, qkv, proj, norm2, fc1, fc2 = parts
        D, dtype = x.shape[2], dispatch.compute_dtype(x)
        y = ops.layer_norm(x, norm1.weight, norm1.bias, norm1.eps, dtype)
        if ids is None:
            attended = ops.attention(qkv(y), self.attn.num_heads, backend=self.attn.backend)
        else:
            q = ops.linear(take_tokens(y, ids), qkv.weight[:D], qkv.bias[:D])
            kv = ops.linear(y, qkv.weight[D:], qkv.bias[D:])
            attended = ops.attention(kv, self.attn.num_heads, q, backend=self.attn.backend)
            x = take_tokens(x, ids)
        y, x = ops.add_layer_norm(self._branch(proj(attended)), x, norm2.weight, norm2.bias, norm2.eps, dtype)
        return x + self._branch(fc2(ops.bias_gelu(ops.linear(y, fc1.weight), fc1.bias)))


class _Parts(NamedTuple):
    """The modules of a block that hold parameters, in the order in which it uses them."""

    norm1: nn.LayerNorm
    qkv: Linear
    proj: Linear
    norm2: nn.LayerNorm
    fc1: Linear
    fc2: Linear

    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.proj, self.fc1, self.fc2


M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of `module` does what kind.forward says, and no hook would notice that it is not called."""
    return type(module) is kind and "forward" not in module.__dict__ and not _torch.is_hooked(module)


class _Options(NamedTuple):
    num_heads: int
    eps1: float
    eps2: float
    dtype: torch.dtype  # of the matrix products
    native: Products


def _block_inference(options: _Options, x: Tensor, repeated: RepeatedTokens | None, *parameters: Tensor) -> Tensor:
    w1, b1, qkv_w, qkv_b, proj_w, proj_b, w2, b2, fc1_w, fc1_b, fc2_w, fc2_b = parameters
    dtype, native = options.dtype, options.native
    y, _, _ = torch.ops.maefast.layer_norm_fwd(x if repeated is None else repeated.rows, w1, b1, options.eps1, dtype)
    qkv = product(y, qkv_w.to(dtype), qkv_b.to(dtype), native)
    qkv = qkv if repeated is None else repeated.expanded(qkv)
    out, _ = torch.ops.maefast.attention_fwd(None, qkv, options.num_heads)
    out = product(out, proj_w.to(dtype), proj_b.to(dtype), native)
    y, x, _, _ = torch.ops.maefast.add_layer_norm_fwd(out, x, w2, b2, options.eps2, dtype)
    if native.forward:
        hidden = product(y, fc1_w.to(dtype), fc1_b.to(dtype), native, gelu=True)
    else:
        hidden = torch.ops.maefast.bias_gelu_fwd(product(y, fc1_w.to(dtype), None, native), fc1_b)
    return x + product(hidden, fc2_w.to(dtype), fc2_b.to(dtype), native)


_PARAMETERS = ("w1", "b1", "qkv_w", "qkv_b", "proj_w", "proj_b", "w2", "b2", "fc1_w", "fc1_b", "fc2_w", "fc2_b")


class _Block(torch.autograd.Function):
    """A whole block. Kept for backward: what is written to memory anyway. Computed again: the outputs of both LayerNorms and of
    GELU, in the passes that read their inputs, and the softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, options: _Options, x: Tensor, rows: Tensor | None, ids_restore: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        w1, b1, qkv_w, qkv_b, proj_w, proj_b, w2, b2, fc1_w, fc1_b, fc2_w, fc2_b = parameters
        dtype, native = options.dtype, options.native
        qkv_w, proj_w, fc1_w, fc2_w = (weight.to(dtype) for weight in (qkv_w, proj_w, fc1_w, fc2_w))
        repeated = None if rows is None or ids_restore is None else RepeatedTokens(rows, ids_restore)
        x1 = x if rows is None else rows
        y, center1, rstd1 = torch.ops.maefast.layer_norm_fwd(x1, w1, b1, options.eps1, dtype)
        qkv = product(y, qkv_w, qkv_b.to(dtype), native)
        qkv = qkv if repeated is None else repeated.expanded(qkv)
        attended, _ = torch.ops.maefast.attention_fwd(None, qkv, options.num_heads)
        y = product(attended, proj_w, proj_b.to(dtype), native)
        y, x_mid, center2, rstd2 = torch.ops.maefast.add_layer_norm_fwd(y, x, w2, b2, options.eps2, dtype)
        hidden = product(y, fc1_w, None, native)
        y = product(torch.ops.maefast.bias_gelu_fwd(hidden, fc1_b), fc2_w, fc2_b.to(dtype), native)
        ctx.options, ctx.parameter_dtypes = options, [parameter.dtype for parameter in parameters]
        kept = (x1, ids_restore, qkv, attended, x_mid, hidden, center1, rstd1, center2, rstd2)
        ctx.save_for_backward(*kept, w1, b1, w2, b2, fc1_b, qkv_w, proj_w, fc1_w, fc2_w)
        return y.add_(x_mid) if y.dtype == x_mid.dtype else x_mid + y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing they may be unpacked once alone
        x1, ids_restore, qkv, attended, x_mid, hidden, center1, rstd1, center2, rstd2 = saved[:10]
        w1, b1, w2, b2, fc1_b, qkv_w, proj_w, fc1_w, fc2_w = saved[10:]
        options = ctx.options
        dtype, native = options.dtype, options.native
        needs = dict(zip(_PARAMETERS, ctx.needs_input_grad[4:], strict=True))
        weight_dtypes = dict(zip(_PARAMETERS, ctx.parameter_dtypes, strict=True))
        narrow = dtype if dout.dtype != dtype else None  # the products' dtype, where the residual stream has another
        grads: dict[str, Tensor] = {}

        def linear_gradients(name: str, dy: Tensor, inputs: Tensor) -> None:
            if needs[f"{name}_w"]:
                grads[f"{name}_w"] = weight_gradient(dy, inputs, weight_dtypes[f"{name}_w"], native)
            if needs[f"{name}_b"]:
                grads[f"{name}_b"] = bias_gradient(dy)

        dy = dout.to(dtype)
        dhidden, grads["fc1_b"], activated = torch.ops.maefast.bias_gelu_bwd(
            input_gradient(dy, fc2_w, native), hidden, fc1_b, True
        )
        linear_gradients("fc2", dy, activated)
        del activated
        dx, grads["w2"], grads["b2"], y, dy = torch.ops.maefast.layer_norm_bwd(
            input_gradient(dhidden, fc1_w, native), dout, x_mid, w2, b2, center2, rstd2, dtype, narrow
        )
        if needs["fc1_w"]:
            grads["fc1_w"] = weight_gradient(dhidden, y, weight_dtypes["fc1_w"], native)
        del dhidden, y
        dy = dx if narrow is None else dy
        linear_gradients("proj", dy, attended)
        dattended = input_gradient(dy, proj_w, native)
        _, dqkv = torch.ops.maefast.attention_bwd(dattended, None, qkv, None, None, options.num_heads)
        if ids_restore is not None:
            dqkv = RepeatedTokens(x1, ids_restore).summed(dqkv)
        dx1, grads["w1"], grads["b1"], y, _ = torch.ops.maefast.layer_norm_bwd(
            input_gradient(dqkv, qkv_w, native), dx if ids_restore is None else None, x1, w1, b1, center1, rstd1, dtype, None
        )
        linear_gradients("qkv", dqkv, y)
        dx, drows = (dx1, None) if ids_restore is None else (dx, dx1)
        wanted = (
            grads[name].to(parameter_dtype) if needs[name] else None
            for name, parameter_dtype in zip(_PARAMETERS, ctx.parameter_dtypes, strict=True)
        )
        return None, dx if ctx.needs_input_grad[1] else None, drows, None, *wanted
