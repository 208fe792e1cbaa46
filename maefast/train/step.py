"""One training step, eager or captured once as a CUDA graph and replayed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MAE

WARM_UP = 3  # steps before a capture: libraries set themselves up, the allocator learns


@contextmanager
def undone_on_error(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Run a backward pass and a step. If one raises, discard the gradients and any new state."""
    known = set(optimizer.state)
    try:
        yield
    except BaseException:
        optimizer.zero_grad()
        for parameter in [p for p in optimizer.state if p not in known]:
            del optimizer.state[parameter]
        raise


def training_step(
    model: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    *args: Any,
    autocast: torch.dtype | None = None,
    before_step: Callable[[], object] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run one step and return its loss, `model(*args, **kwargs).loss`.

    autocast       the dtype of the forward pass; None: the model's own
    before_step    is called between backward pass and optimizer step, to change the gradients
    """
    with nullcontext() if autocast is None else torch.autocast(args[0].device.type, autocast):
        loss = model(*args, **kwargs).loss
    optimizer.zero_grad()
    with undone_on_error(optimizer):
        loss.backward()
        if before_step is not None:
            before_step()
        optimizer.step()
    return loss.detach()


def read_later(value: Tensor) -> Callable[[], Any]:
    """Return a function that reads the numbers in `value`. From a GPU they are copied at once, so
    that reading does not wait for steps launched since."""
    if value.device.type != "cuda":
        return value.tolist
    there = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> Any:
        done.synchronize()
        return there.tolist()

    return read


class GraphedStep:
    """`training_step` as a CUDA graph, for batches so small that a GPU may wait for launches.

    model       a maefast.MAE, compiled or not, on one GPU
    optimizer   torch's Adam or AdamW: `adamw(..., backend="torch", capturable=True)`
    imgs        (N, C, H, W) a batch; later ones have its shape, dtype and device
    mask_ratio  share of the patches that is removed
    autocast    torch.bfloat16, or None for the model's own dtype
    clip_grad   greatest norm of the gradient, or None
    noise       (N, L) the noise of a batch, if each call is given its own
    weights     (N, L) the weights of its patches, if each call is given its own

    Without noise, the graph draws it from the GPU's default generator at each call. Learning rates
    are tensors that the graph reads: assign to `group["lr"]`, or let a scheduler do it.
    `load_state_dict` of model and optimizer may be called between steps. Construction leaves
    weights, optimizer and generator as they were. After a call each parameter's `grad` holds its
    gradient. Raises TypeError or ValueError for arguments that do not fit, RuntimeError if the
    model is not on CUDA.
    """

    def __init__(
        self,
        model: MAE,
        optimizer: torch.optim.Optimizer,
        imgs: Tensor,
        *,
        mask_ratio: float = 0.75,
        autocast: torch.dtype | None = None,
        clip_grad: float | None = None,
        noise: Tensor | None = None,
        weights: Tensor | None = None,
    ):
        given = _given(imgs, noise, weights)
        _check(model, optimizer, given, autocast)
        require_cuda(imgs.device)
        self._optimizer, self._inputs = optimizer, {name: tensor.clone() for name, tensor in given.items()}
        options: dict[str, Any] = {"autocast": autocast, "return_pred": bool(model.overridden_methods())}
        options |= {name: tensor for name, tensor in self._inputs.items() if name != "imgs"}
        rates = [group["lr"] for group in optimizer.param_groups]
        self._rates = [torch.as_tensor(rate, dtype=torch.float32, device=imgs.device).clone() for rate in rates]
        self._point_to_rates()

        def clip() -> None:
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_grad)

        def step() -> Tensor:
            return training_step(model, optimizer, self._inputs["imgs"], mask_ratio, before_step=clip, **options)

        before = _Snapshot(model, optimizer)
        try:
            self._graph, self._loss = _captured(step, imgs.device)
        except BaseException:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            raise
        finally:
            before.restore()
        self._state = [(p, name, value) for p, state in optimizer.state.items() for name, value in state.items()]
        optimizer.register_load_state_dict_post_hook(lambda _: self._take_up_loaded_state())

    def __call__(self, imgs: Tensor, noise: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Run one step on a batch on any device; return its loss on the GPU without waiting for it.
        Raises ValueError unless shapes and dtypes are those of the first batch."""
        given = _given(imgs, noise, weights)
        if given.keys() != self._inputs.keys():
            expected, got = (" and ".join(names) for names in (self._inputs, given))
            raise ValueError(f"a step must be given what it was captured with, {expected}; it is given {got}")
        for name, tensor in given.items():
            held = self._inputs[name]
            if tensor.shape != held.shape or tensor.dtype != held.dtype:
                expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (held, tensor))
                raise ValueError(f"{name} must be as those that the step was captured with, {expected}; they are {got}")
        for name, tensor in given.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._point_to_rates()
        self._graph.replay()
        return self._loss.clone()

    def _point_to_rates(self) -> None:
        """Write an assigned learning rate to where the graph reads it."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    @torch.no_grad()
    def _take_up_loaded_state(self) -> None:
        """Copy the state that the optimizer has loaded to where the graph reads it."""
        for parameter, name, held in self._state:
            state = self._optimizer.state[parameter]
            if name in state:
                held.copy_(state[name])
            else:  # the loaded state is one before the first step, when all of Adam's is zero
                held.zero_()
            state[name] = held


def _given(imgs: Tensor, noise: Tensor | None, weights: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in (("imgs", imgs), ("noise", noise), ("weights", weights)) if t is not None}


def _check(model: nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, Tensor], autocast: torch.dtype | None) -> None:
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"optimizer must be torch's Adam or AdamW; it is {type(optimizer).__name__}")
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError("optimizer must have capturable=True in all its groups; it has False")
    if autocast not in (None, torch.bfloat16):
        hint = ", which would need a gradient scaler" if autocast == torch.float16 else ""
        raise ValueError(f"autocast must be torch.bfloat16 or None; it is {autocast}{hint}")
    devices = {p.device for p in model.parameters()} | {tensor.device for tensor in given.values()}
    if len(devices) > 1:
        names = " and ".join(", ".join(("model", *given)).rsplit(", ", 1))
        raise ValueError(f"{names} must be on one device; they are on {', '.join(sorted(map(str, devices)))}")


def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"GraphedStep needs CUDA; model and imgs are on {device}")


def _captured(step: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return the graph of `step` and the tensor of its loss; the generator is left as it was."""
    with torch.cuda.device(device):
        generator, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # the warm-up is not captured
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        torch.cuda.set_rng_state(generator)
    return graph, loss


class _Snapshot:
    """Weights, buffers and Adam's state, to be restored in place: a graph holds their addresses."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        self.state = {id(value): value.clone() for value in self._states()}

    def _states(self) -> list[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.tensors:
            tensor.copy_(value)
        for value in self._states():
            if id(value) in self.state:
                value.copy_(self.state[id(value)])
            else:  # it began during the warm-up, and all of Adam's state begins at zero
                value.zero_()
