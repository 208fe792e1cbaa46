"""Contenders of a training step (forward, backward, fused AdamW) with shared weights."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
import traffic
from gpusteps import GraphedRun, scaled_step
from rotation import NotOursError
from torch import Tensor, nn

import maefast
from maefast.reference import ReferenceMAE
from maefast.testing.errors import assert_close_to_float64
from maefast.testing.timing import Run
from maefast.train.optim import adamw

Forward = Callable[[Tensor, Tensor], Any]

SETS = 3
MASK_RATIO, LR = 0.75, 1e-4
CHUNK = {"cpu": 4, "cuda": 32}  # images at a time in the float64 reference
SMALL_BATCH = 64  # up to which a CUDA graph may gain

REFERENCES = {"reference-math": "math", "reference-sdpa": "sdpa", "reference-sdpa-compiled": "sdpa"}
OURS = ("maefast", "maefast-no-pred", "maefast-compiled")
FP16 = "reference-math-fp16"  # on a GPU: autocast to fp16 with a gradient scaler
GRAPHED = "maefast-graphed"  # on a GPU: maefast-no-pred as a CUDA graph
TRANSFORMERS = ("transformers", "transformers-compiled")


@dataclass(frozen=True)
class Size:
    """The sizes of a model, with the constructor's names, and the batch size."""

    batch: int
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int

    @property
    def model(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "batch"}

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def flops(self) -> int:
        L, P = self.patches, 3 * self.patch_size**2
        K = int(L * (1 - MASK_RATIO))
        return traffic.mae_step_flops(self.batch, L, K, P, self.embed_dim, self.depth, self.decoder_embed_dim, self.decoder_depth)


@dataclass(frozen=True)
class StepWorkload:
    label: str
    size: Size
    variant: str  # "fp32", or "bf16": under autocast
    device: torch.device

    eager_name = "reference-sdpa"
    compiled_name = "reference-sdpa-compiled"

    @property
    def name(self) -> str:
        return f"step-{self.label}-{self.variant}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.variant == "bf16" else torch.float32

    @property
    def images(self) -> int:
        return self.size.batch

    @property
    def contenders(self) -> list[str]:
        on_gpu = self.device.type == "cuda"
        return [*[FP16] * on_gpu, *REFERENCES, *OURS, *[GRAPHED] * (on_gpu and self.size.batch <= SMALL_BATCH), *TRANSFORMERS]

    def bench(self) -> "StepBench":
        return StepBench(self)


class StepBench:
    """Inputs, weights and optimizer of a workload, and its contenders."""

    sets, graphed = SETS, GRAPHED
    bytes = None  # weights, activations and states: no sum of these is a floor worth dividing by

    def __init__(self, workload: StepWorkload):
        self.workload, size = workload, workload.size
        torch.manual_seed(0)
        device = workload.device
        self.imgs = torch.randn(SETS, size.batch, 3, size.img_size, size.img_size, device=device)
        self.noise = torch.stack([self._seeded_noise(i) for i in range(SETS)])
        torch.manual_seed(0)
        with device:
            self.weights = self._build(ReferenceMAE, attention="math")
        self.optimizer = adamw(trained(self.weights), LR, backend="torch")
        # The error of a result is compared with this one's. Math attention may not fit into a GPU.
        self.yardstick = "reference-sdpa" if device.type == "cuda" else "reference-math"
        self.flops = size.flops
        self._forwards: dict[str, Forward] = {}
        self._results: dict[str, dict[str, Tensor]] = {}

    def _build(self, model_class: type[nn.Module], **options: Any) -> nn.Module:
        return model_class(**self.workload.size.model, norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True, **options)

    def _seeded_noise(self, i: int) -> Tensor:
        """Return the noise (N, L) that the model would draw after seed i."""
        torch.manual_seed(i)
        return torch.rand(self.workload.size.batch, self.workload.size.patches, device=self.workload.device)

    def why_not(self, contender: str) -> str | None:
        missing = contender in TRANSFORMERS and find_spec("transformers") is None
        return "transformers is not installed" if missing else None

    def _sharing(self, model_class: type[nn.Module], **options: Any) -> nn.Module:
        """Return a new model that shares the parameters of `self.weights`."""
        with self.workload.device:
            model = self._build(model_class, **options)
        model.load_state_dict(self.weights.state_dict(keep_vars=True), assign=True)
        return model

    def forward(self, contender: str) -> Forward:
        """Return (imgs, noise) -> an output whose first item is the loss. It is compiled once."""
        if contender in self._forwards:
            return self._forwards[contender]
        if contender.startswith("reference"):
            model: Any = self._sharing(ReferenceMAE, attention=REFERENCES.get(contender, "math"))
        else:
            model = self._sharing(maefast.MAE)
        if contender.endswith("-compiled"):
            model = torch.compile(model, fullgraph=True, dynamic=False)
        options = {"return_pred": False} if contender == "maefast-no-pred" else {}
        self._forwards[contender] = lambda imgs, noise: model(imgs, MASK_RATIO, noise=noise, **options)
        return self._forwards[contender]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.workload.device.type, torch.bfloat16, enabled=self.workload.variant == "bf16")

    def run(self, contender: str) -> Run:
        if contender == GRAPHED:
            return self._graphed
        if contender == FP16:
            return scaled_step(self._loss_in_fp16, self.optimizer, self.workload.device)
        if contender in TRANSFORMERS:
            model = transformers_model(self.workload.size).to(self.workload.device)

            def forward(imgs: Tensor, noise: Tensor) -> Any:
                return model(pixel_values=imgs, noise=noise)

            if contender.endswith("-compiled"):
                forward = torch.compile(forward, dynamic=False)
            return self._step(forward, adamw(trained(model), LR, backend="torch"))
        return self._step(self.forward(contender), self.optimizer)

    def _loss_in_fp16(self, i: int) -> Tensor:
        with torch.autocast(self.workload.device.type, torch.float16):
            return self.forward(FP16)(self.imgs[i], self.noise[i])[0]

    @cached_property
    def _graphed(self) -> GraphedRun:
        model = self._sharing(maefast.MAE)
        optimizer = adamw(trained(model), LR, backend="torch", capturable=True)
        autocast = torch.bfloat16 if self.workload.variant == "bf16" else None
        return GraphedRun(model, optimizer, self.imgs, mask_ratio=MASK_RATIO, autocast=autocast)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of weights, moments of trained weights, and a batch."""
        moments = 2 * sum(p.nbytes for p in trained(self.weights))
        return sum(p.nbytes for p in self.weights.parameters()) + moments + self.imgs[0].nbytes + self.noise[0].nbytes

    def forget(self) -> None:
        """Free the expected results of the gate."""
        self._results.clear()
        self.__dict__.pop("exact", None)

    def _step(self, forward: Forward, optimizer: torch.optim.Optimizer) -> Run:
        def step(i: int) -> None:
            try:
                with self.autocast():
                    loss = forward(self.imgs[i], self.noise[i])[0]
                loss.backward()
                optimizer.step()
            finally:  # when memory runs out, the next contender must not add to half of the gradients
                optimizer.zero_grad(set_to_none=True)

        return step

    def results(self, contender: str) -> dict[str, Tensor]:
        """Return the losses of all input sets, and prediction and gradients of the first set."""
        if contender in self._results:
            return self._results[contender]
        forward, losses = self.forward(contender), []
        found: dict[str, Tensor] = {}
        for imgs, noise in zip(self.imgs, self.noise, strict=True):
            try:
                with self.autocast():
                    out = forward(imgs, noise)
                out[0].backward()
                losses.append(out[0].detach())
                if not found:
                    found = gradients(self.weights)
                    if out[1] is not None:
                        found["pred"] = out[1].detach()
            finally:
                self.weights.zero_grad(set_to_none=True)
        found["loss"] = torch.stack(losses)
        if contender in REFERENCES:
            self._results[contender] = found
        return found

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Compute the results in float64, a few images at a time.

        All images remove the same number of patches, so the loss is the mean over the chunks.
        """
        model = copy.deepcopy(self.weights).double()
        losses, preds, chunk = torch.zeros(SETS, dtype=torch.float64), [], CHUNK[self.workload.device.type]
        for i, (imgs, noise) in enumerate(zip(self.imgs, self.noise, strict=True)):
            with torch.set_grad_enabled(i == 0):
                for some, its_noise in zip(imgs.split(chunk), noise.split(chunk), strict=True):
                    out = model(some.double(), MASK_RATIO, noise=its_noise)
                    part = out.loss * (len(some) / len(imgs))
                    if i == 0:
                        part.backward()
                        preds.append(out.pred.detach())
                    losses[i] += part.item()
        return gradients(model) | {"pred": torch.cat(preds), "loss": losses.to(self.imgs.device)}

    def check(self, contender: str, run: Run) -> None:
        """Check loss, prediction and every gradient by the error rule; for a graph only losses.

        Models with other weights, and fp16, whose gradients need the scaler, are not checked.
        Single tensors of compiled code may break the rule. The vector of all its gradients
        must be within the error of the reference, eager or compiled.
        """
        if contender in (FP16, *TRANSFORMERS):
            return
        if contender == GRAPHED:
            name, yardstick = f"{self.workload.name}, {contender}, loss", self.results(self.yardstick)
            assert_close_to_float64(name, self._graphed.losses(), yardstick["loss"], self.exact["loss"])
            return
        got = self.results(contender)
        lost = self.exact.keys() - got.keys() - {"pred"}
        assert not lost, f"{self.workload.name}, {contender}: no gradient for {sorted(lost)}"
        if contender == "maefast-compiled":
            where, mine, exact = f"{self.workload.name}, {contender}, all gradients", whole(got), whole(self.exact)
            try:
                assert_close_to_float64(where, mine, whole(self.results(self.yardstick)), exact)
            except AssertionError:
                assert_close_to_float64(where, mine, whole(self.results(self.workload.compiled_name)), exact)
        try:
            for name, result in got.items():
                where = f"{self.workload.name}, {contender}, {name}"
                assert_close_to_float64(where, result, self.results(self.yardstick)[name], self.exact[name])
        except AssertionError as breach:
            if contender in ("maefast", "maefast-no-pred"):
                raise
            raise NotOursError(str(breach)) from None


def whole(results: dict[str, Tensor]) -> Tensor:
    """Concatenate all gradients in the order of their names."""
    return torch.cat([results[name].flatten() for name in sorted(results) if name.startswith("d_")])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def transformers_model(size: Size) -> nn.Module:
    """Return transformers' ViTMAE of the same size, with its own weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=size.img_size,
        patch_size=size.patch_size,
        hidden_size=size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=size.decoder_embed_dim,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_num_heads,
        decoder_intermediate_size=4 * size.decoder_embed_dim,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config)
