"""Tasks: which head a dataset needs, which loss trains it, and which logit τ looks at.

| task | outputs | targets | loss |
|---|---|---|---|
| classification | [B, C] | [B] int64 | cross-entropy |
| regression | [B, 1] | [B] float | ½·squared error |
| sequence | [B, T, V] | [B, T] int64 | token-wise cross-entropy, mean over positions |
| multilabel | [B, L] | [B, L] float in {0, 1} | binary cross-entropy, mean over labels |

A loss is anything that gives one number per sample; a scalar (mean) loss is read as "the loss of a batch of one".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.config import TASKS
from cape.errors import ModelError, SpecError, did_you_mean, first_line
from cape.memory import device_failed
from cape.state import draws_of, preserved

LossLike = str | nn.Module | Callable[[Tensor, Tensor], Tensor]

TASK_LOSS = {
    "classification": "cross_entropy",
    "regression": "half_mse",
    "sequence": "sequence_cross_entropy",
    "multilabel": "binary_cross_entropy",
}
assert tuple(TASK_LOSS) == TASKS

IGNORE_INDEX = -100
DETACHED = "The model's outputs do not depend on its parameters; do not detach them, or compute them without gradients."


def _mean_per_sample(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _class_dim_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return _mean_per_sample(F.cross_entropy(outputs, _labels(targets), reduction="none"))


def _labels(targets: Tensor) -> Tensor:
    """Return whole numbers as int64, which alone torch takes for labels; probabilities stay."""
    return targets if targets.is_floating_point() else targets.long()


def _sequence_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return _mean_per_sample(
        F.cross_entropy(outputs.flatten(0, 1), _labels(targets).flatten(), reduction="none").view_as(targets)
    )


def _match(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return float targets in the shape of the outputs ([B] targets serve [B, 1] outputs)."""
    return targets.to(outputs.dtype).reshape(outputs.shape)


def _half_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return _mean_per_sample(0.5 * (outputs - _match(outputs, targets)).square())


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return _mean_per_sample(F.binary_cross_entropy_with_logits(outputs, _match(outputs, targets), reduction="none"))


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _class_dim_cross_entropy,
    "sequence_cross_entropy": _sequence_cross_entropy,
    "half_mse": _half_mse,
    "mse": _half_mse,
    "binary_cross_entropy": _binary_cross_entropy,
    "bce": _binary_cross_entropy,
    "one_hot_mse": _half_mse,
}
_MULTILABEL = {"binary_cross_entropy", "bce", "one_hot_mse"}


class Loss:
    """A loss in the two forms that CAPE needs: one number per sample, and the mean that training minimizes.

    Args:
        loss: a name (``cross_entropy``, ``sequence_cross_entropy``, ``half_mse`` or ``mse``,
            ``binary_cross_entropy`` or ``bce``, ``one_hot_mse``), an ``nn.Module``, or any callable
            ``(outputs, targets) -> [B] or [B, ...] or scalar``.

    Raises:
        SpecError: an unknown name, or something that cannot be called.
    """

    def __init__(self, loss: LossLike) -> None:
        if isinstance(loss, str):
            if loss not in _NAMED:
                raise SpecError(f"Unknown loss '{loss}'.{did_you_mean(loss, _NAMED)}")
            self.name = loss
            self._named: Callable[[Tensor, Tensor], Tensor] | None = _NAMED[loss]
            self._function: Callable[[Tensor, Tensor], Tensor] = _NAMED[loss]
        elif isinstance(loss, type):
            raise SpecError(f"The loss {loss.__name__} is a class; give one of it: {loss.__name__}().")
        elif callable(loss):
            self.name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "custom")
            self._named = None
            self._function = loss
        else:
            raise SpecError(f"A loss is a name, an nn.Module or a callable, not {loss!r}.")

    def beside(self, model: nn.Module) -> nn.Module:
        """Return a module that holds a model and, where the loss is one, the loss: what a pass may change."""
        return nn.ModuleList([model, self._function]) if isinstance(self._function, nn.Module) else model

    @property
    def is_named(self) -> bool:
        """Whether the loss was given by name: its per-sample values are then known to be independent of each other."""
        return self._named is not None

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample alone, [B], differentiable in ``outputs``."""
        ignored = getattr(self._function, "ignore_index", None)
        if ignored is not None and not targets.is_floating_point():  # a mean over no label at all is not a number
            nothing = (targets.long() == ignored).reshape(len(targets), -1).all(1)
            if bool(nothing.any()):
                harmless = targets.masked_fill(nothing.view(-1, *[1] * (targets.dim() - 1)), 0)
                return self._each(outputs, harmless) * ~nothing
        return self._each(outputs, targets)

    def _of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what the loss says; a callable, which may write into its targets, has a copy of them."""
        return self._function(outputs, targets if self.is_named else targets.clone())

    def _each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        values = self._of(outputs, targets)
        if values.dim() > 0 and values.shape[0] == outputs.shape[0]:
            return _mean_per_sample(values)
        if values.dim() > 0:
            raise ModelError(
                f"The loss '{self.name}' returned shape {tuple(values.shape)} for a batch of {outputs.shape[0]};"
                " return one number per sample or a scalar."
            )
        if outputs.shape[0] == 1:
            return values.reshape(1)
        # A mean loss: each sample's loss is that of a batch of one. vmap where the callable allows it.
        try:
            return torch.func.vmap(lambda o, t: self._of(o[None], t[None]))(outputs, targets)
        except (RuntimeError, ValueError, TypeError) as error:  # data-dependent callables cannot be vmapped
            if device_failed(error):
                raise
            rows = [self._of(outputs[i : i + 1], targets[i : i + 1]) for i in range(outputs.shape[0])]
            return torch.stack(rows)

    def check_alone(self, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """Raise ``ModelError`` where some sample's loss is another in a batch of one.

        torch's own losses are known not to do that, and what a loss that draws random numbers does is not. A scalar's
        samples were computed alone already: it must lie among them, as a mean does, however weighted, or be their sum,
        and pull at each sample's outputs as that sample alone does.

        Args:
            outputs: [B, ...], without a graph. losses: of each sample alone, [B].
        """
        if self.is_named or type(self._function).__module__ == "torch.nn.modules.loss":
            return
        if not bool(losses.isfinite().all()):
            return  # which is said elsewhere
        devices = [outputs.device.index] if outputs.is_cuda else []
        before = draws_of(devices)
        whole = self._of(outputs, targets)
        if before != draws_of(devices):
            return
        if whole.dim() == 0:
            off = torch.finfo(losses.dtype).eps ** 0.4 * losses.abs().amax()
            among = losses.amin() - off <= whole <= losses.amax() + off
            mean = among or torch.isclose(whole, losses.sum(), rtol=1e-3)
            if not mean or not self._pulls_alike(outputs, targets):
                raise ModelError(
                    f"The loss '{self.name}' of the batch is no mean and no sum of its samples' losses alone, so that"
                    " no sample has a loss of its own; return each sample's loss, or their mean."
                )
            return
        alone = []
        for i in range(len(outputs)):
            try:
                value = self._of(outputs[i : i + 1], targets[i : i + 1])
            except Exception as error:  # it cannot take one sample: it holds something of the whole batch
                if device_failed(error):
                    raise
                return
            if value.dim() > 0 and len(value) != 1:
                raise ModelError(
                    f"The loss '{self.name}' returned shape {tuple(value.shape)} for one sample; return one number per"
                    " sample, [B], or a scalar."
                )
            alone.append(_mean_per_sample(value.reshape(1, -1)))
        gap = (torch.cat(alone) - losses).abs()
        if bool((gap > torch.finfo(losses.dtype).eps ** 0.4 * losses.abs().amax()).any()):
            raise ModelError(
                f"The loss '{self.name}' gives a sample another number in a batch than alone, so that it has no"
                " loss of its own; return each sample's loss, unweighted by the others, or their mean."
            )

    def _pulls_alike(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether a scalar pulls at each sample's outputs in the direction in which that sample's loss alone does."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (whole,) = torch.autograd.grad(self._of(leaf, targets), leaf)
            (alone,) = torch.autograd.grad(self.per_sample(leaf, targets).sum(), leaf)
        whole, alone = (g.reshape(len(g), -1) for g in (whole, alone))
        share = (whole * alone.conj()).sum(1) / alone.abs().square().sum(1).clamp(min=torch.finfo(alone.dtype).tiny)
        rest = whole - share[:, None] * alone
        limit = torch.finfo(outputs.dtype).eps ** 0.4 * whole.abs().amax()
        return bool((rest.abs() <= limit).all())

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar that training minimizes: the callable's own mean, or the mean over samples."""
        values = self._of(outputs, targets)
        return values if values.dim() == 0 else values.mean()

    def target_logit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the logit that τ looks at, one number per sample, [B], differentiable in ``outputs``.

        Classification: the true class's logit. Sequences and dense outputs: the mean over positions of the true
        classes' logits (ignored positions left out). Multi-label: the mean over the labels that are on (zero
        where none is). Anything else: the mean of the outputs (a regression's scalar output itself), or of their real
        parts.
        """
        if self._by_label(outputs, targets):
            dim = self._class_dim(outputs, targets)
            valid = self._valid(targets, outputs.shape[dim])
            logits = outputs.gather(dim, targets.where(valid, 0).long().unsqueeze(dim)).squeeze(dim)
            logits, valid = logits.reshape(len(logits), -1), valid.reshape(len(logits), -1)
            return (logits * valid).sum(1) / valid.sum(1).clamp(min=1)
        flat = outputs.reshape(outputs.shape[0], -1)
        if self._is_multilabel(outputs, targets):
            on = _match(outputs, targets).reshape(flat.shape)
            return (flat * on).sum(1) / on.sum(1).clamp(min=1)
        return (flat.real if flat.is_complex() else flat).mean(1)

    def cotangents(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each sample's loss [B], and its gradient and that of its target logit in the outputs.

        Args:
            outputs: [B, ...], without a graph. targets: as ``check`` has let them pass.

        Returns:
            (losses [B], gradient of the loss, gradient of the target logit), the gradients shaped as the outputs. The
            losses have the graph of what they were computed from beside the outputs.
        """
        if self._named is _class_dim_cross_entropy and outputs.dim() == 2 and targets.dim() == 1:
            index = targets.long().unsqueeze(1)
            valid = index != IGNORE_INDEX
            index = index.where(valid, 0)
            of_logit = torch.zeros_like(outputs).scatter_(1, index, valid.to(outputs.dtype))
            logs = outputs.log_softmax(1)
            losses = -(logs.gather(1, index) * valid).squeeze(1)
            return losses, (logs.exp() - of_logit) * valid, of_logit
        leaf = outputs.detach().requires_grad_()
        losses = self.per_sample(leaf, targets)
        self.check_alone(leaf.detach(), targets, losses.detach())
        (of_loss,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
        (of_logit,) = torch.autograd.grad(self.target_logit(leaf, targets).sum(), leaf)
        return losses, of_loss, of_logit

    def check(self, outputs: Any, targets: Tensor) -> None:
        """Raise ``ModelError`` where outputs and targets cannot belong together, or an output is not finite.

        Minus infinity is what is masked; whether the loss can do with it the loss says.
        """
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"The model returned {type(outputs).__name__}, not a tensor; wrap it so that it returns its logits."
            )
        if outputs.layout is not torch.strided or not (outputs.is_floating_point() or outputs.is_complex()):
            raise ModelError(
                f"The model returned {outputs.dtype} numbers ({outputs.layout}); it must return floating-point ones in"
                " a dense tensor."
            )
        if outputs.dim() == 0 or outputs.shape[0] != targets.shape[0]:
            raise ModelError(
                f"The model returned shape {tuple(outputs.shape)} for {targets.shape[0]} targets;"
                " the first dimension must be the batch."
            )
        masked = outputs.isneginf() if outputs.is_floating_point() else False
        if not bool((torch.isfinite(outputs) | masked).all()):
            raise ModelError(
                "The model returned NaN or infinite outputs at initialization; check its inputs and weights."
            )
        if self._by_label(outputs, targets) and targets.numel():
            classes = outputs.shape[self._class_dim(outputs, targets)]
            valid = targets[self._valid(targets, classes)]
            low, high = (int(valid.min()), int(valid.max())) if valid.numel() else (0, 0)
            if low < 0 or high >= classes:
                one = " One output for two classes goes with the loss 'bce'." if classes == 1 else ""
                raise ModelError(
                    f"Labels run from {low} to {high}, but the model has {classes} outputs; labels must lie in"
                    f" 0..{classes - 1}.{one}"
                )
        self._check_fit(outputs, targets)

    def _valid(self, targets: Tensor, classes: int) -> Tensor:
        """Return which labels name a class, bool as ``targets``: all but those that the loss ignores.

        What a callable that does not say it ignores is not known: it may be any label beyond the classes.
        """
        ignored = IGNORE_INDEX if self._named is not None else getattr(self._function, "ignore_index", None)
        numbers = targets.long()  # of uint8, -100 is 156
        return (numbers >= 0) & (numbers < classes) if ignored is None else numbers != ignored

    def _by_label(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether targets are the numbers of classes: whole, one for each row of outputs, and not compared with them.

        A single output has no classes, unless the loss says so.
        """
        whole = not targets.is_floating_point() and targets.dim() == outputs.dim() - 1
        if not whole or self._named in (_half_mse, _binary_cross_entropy):
            return False
        if self._named is not None:
            return True
        dim = self._find_class_dim(outputs, targets)  # none: what a callable makes of such targets is its own affair
        return dim is not None and outputs.shape[dim] > 1

    def _check_fit(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ``ModelError`` where the loss cannot be computed of outputs and targets of these shapes."""
        if self._named is _class_dim_cross_entropy and self._by_label(outputs, targets):
            if self._class_dim(outputs, targets) == 1:
                return  # they were just looked at
            raise ModelError(
                f"Outputs of shape {tuple(outputs.shape)} have their classes last for targets of shape"
                f" {tuple(targets.shape)}; the loss for these is 'sequence_cross_entropy'."
            )
        shapes = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}, {targets.dtype}"
        if self._named in (_half_mse, _binary_cross_entropy) and targets.numel() != outputs.numel():
            raise ModelError(
                f"The loss '{self.name}' compares outputs with targets of the same shape, not {shapes}; class labels"
                " go with cross_entropy, or as one number for each class."
            )
        if self._named is _binary_cross_entropy and targets.numel():
            low, high = float(targets.min()), float(targets.max())
            if not 0.0 <= low <= high <= 1.0:
                raise ModelError(
                    f"The loss '{self.name}' takes targets from 0 to 1, but these run from {low:g} to {high:g}; labels"
                    " of several classes go with cross_entropy and one output for each."
                )
        try:
            # Whatever it draws, or keeps, it has another time for the loss that counts.
            once = nullcontext() if self.is_named else preserved(self.beside(nn.Identity()))
            with once, torch.enable_grad():
                value = self._of(outputs.detach().requires_grad_(), targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if device_failed(error):
                raise
            raise ModelError(f"The loss '{self.name}' cannot be computed of {shapes} ({first_line(error)}).") from error
        if not isinstance(value, Tensor):
            raise ModelError(f"The loss '{self.name}' returned {type(value).__name__}; return a tensor.")
        if not value.requires_grad:
            raise ModelError(f"The loss '{self.name}' does not depend on the outputs; do not detach them.")

    def _class_dim(self, outputs: Tensor, targets: Tensor) -> int:
        dim = self._find_class_dim(outputs, targets)
        if dim is None:
            raise ModelError(
                f"Targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(outputs.shape)}."
            )
        return dim

    def _find_class_dim(self, outputs: Tensor, targets: Tensor) -> int | None:
        torch_layout = targets.shape == outputs.shape[:1] + outputs.shape[2:]
        last_layout = targets.shape == outputs.shape[:-1]
        if last_layout and (self.name == "sequence_cross_entropy" or not torch_layout):
            return outputs.dim() - 1
        return 1 if torch_layout else None

    def _is_multilabel(self, outputs: Tensor, targets: Tensor) -> bool:
        if self.name in _MULTILABEL or isinstance(self._function, (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)):
            return targets.numel() == outputs.numel()
        return False
