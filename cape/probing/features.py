"""φ: from a model and one batch to the features of the meta-regressor (paper, Eq. 9 to 12; design, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from cape.checks import check_batch, check_dense, running, trainable
from cape.config import check_count, check_lr
from cape.errors import ModelError, SpecError
from cape.memory import kept_memory
from cape.probing.ends import Ends, EndSignals
from cape.probing.operators import mark_data
from cape.probing.ops import size_sums, use_backend
from cape.probing.per_sample import all_norms
from cape.probing.separation import separation
from cape.probing.signals import LayerSignals, draw_noise, layer_signals, output_spread, own_decrease, spread
from cape.probing.wanted import Norms
from cape.samples import Samples
from cape.state import (
    Inputs,
    Untouched,
    as_real,
    call,
    eagerly,
    ordinary_tensor,
    preserved,
    seed_draws,
)
from cape.surroundings import undisturbed
from cape.tasks import DETACHED, Loss, LossLike

LINE = (1, 4, 16)  # updates of lr·sign ∇L after which the loss is looked at
_TINY = 1e-300


@dataclass(frozen=True)
class Features:
    """The probe's result; natural logarithms throughout.

    Attributes:
        log_p: trainable parameters.
        log_g2: mean over samples of ‖∇θ ℓ_b‖² (Eq. 10; batch norm in eval mode, dropout off).
        log_tau: mean over samples of the squared gradient norm of the target logit.
        log_tau_full: the same for the whole output Jacobian (Eq. 11); ``None`` unless asked for.
        log_n: full training-set size.
        log_lr: learning rate.
        log_b: batch size.
        log_l0: loss of the batch before any update, in train mode (the L_0 of T*).
        log_first_step: log(lr·‖∇L‖₁ / L_0): the relative decrease that AdamW's first update promises.
        log_grad_l1, log_grad_l2: ‖∇L‖₁ and ‖∇L‖₂ of the mean loss, in train mode.
        line_1, line_4, line_16: log(L(θ - k·lr·sign ∇L) / L_0) for k = 1, 4 and 16.
        log_output_spread: log of the deviation of an output over the samples, root mean square over the outputs, in
            train mode: low where the model hardly tells its inputs apart.
        log_weakest_layer: log min_l rms(∇_l L) / rms(∇L): low where the gradient vanishes on its way to a layer.
        log_last_share: log ‖∇_last L‖₁ / ‖∇L‖₁: the head's share of the first update's decrease.
        log_move: log(lr·√P / ‖θ‖₂): the first update's length beside the parameters'.
        spread_1, spread_16: deviation of the samples' losses over their mean, at k = 1 and 16.
        log_own_16: log of the relative decrease, to first order and at k = 16, that the samples' own movement of the
            outputs brings, without what moves all of them alike (see ``signals.own_decrease``).
        log_layers: trainable tensors of two dimensions or more, one at least.
        log_inputs, log_outputs: numbers that a sample has, and that the model makes of it.
        draw_noise: how far another draw of dropout, or of any other noise from torch's generators, moves an output in
            train mode (see ``signals.draw_noise``); 0 for a model that draws nothing.
        log_steepness, log_hardness, log_flow: how hard the batch's targets are to tell apart by its inputs (see
            ``separation``).
        log_hidden_hardness, log_hidden_size, log_hidden_pull, log_entry_pull, log_late_share: what the first weight and
            the last one see, in train mode, and how the loss depends on it (see ``ends.end_signals``).
    """

    log_p: float
    log_g2: float
    log_tau: float
    log_tau_full: float | None
    log_n: float
    log_lr: float
    log_b: float
    log_l0: float
    log_first_step: float
    log_grad_l1: float
    log_grad_l2: float
    line_1: float
    line_4: float
    line_16: float
    log_output_spread: float
    log_weakest_layer: float
    log_last_share: float
    log_move: float
    spread_1: float
    spread_16: float
    log_own_16: float
    log_layers: float
    log_inputs: float
    log_outputs: float
    draw_noise: float
    log_steepness: float
    log_hardness: float
    log_flow: float
    log_hidden_hardness: float
    log_hidden_size: float
    log_hidden_pull: float
    log_entry_pull: float
    log_late_share: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the features by name, in the order of ``FEATURE_NAMES``."""
        return asdict(self)


@undisturbed()
def probe(
    model: nn.Module,
    batch: tuple[Inputs, Tensor],
    *,
    loss: LossLike = "cross_entropy",
    lr: float,
    dataset_size: int,
    tau: str = "true_logit",
    backend: str = "auto",
) -> Features:
    """Return the features of a model at initialization, from one batch and with no parameter update.

    Costs one forward and two input-gradient backward passes (the norms), one ordinary forward and backward pass, and
    three forward passes along the direction of AdamW's first update; a model that draws random numbers, one forward
    pass more. The model, its buffers, modes and gradients and the global RNG are left bit for bit as they were.

    Args:
        model: any ``nn.Module``.
        batch: (inputs, targets) on the model's device.
        loss: a name, an ``nn.Module`` or a callable.
        lr: learning rate of AdamW.
        dataset_size: number of samples in the *full* training set.
        tau: ``true_logit``, or ``full`` or ``hutchinson`` to fill ``log_tau_full`` as well.
        backend: ``auto``, ``native`` or ``torch`` operators.

    Raises:
        ModelError: the model or batch cannot be probed (see ``per_sample_norms``), or its loss is not positive.
        SpecError: a bad lr, dataset size or backend.
    """
    lr, dataset_size = check_lr(lr), check_count(dataset_size, "dataset_size")
    x, _, count = check_batch(batch)
    check_dense(Samples.of(x, count))
    with use_backend(backend), kept_memory(batch[1].device):
        line = first_step(model, batch, Loss(loss), lr)  # first: it says what is wrong with model and batch
        norms = all_norms(model, batch, loss=loss, tau=tau, backend=backend)
    return features_of(model, batch, norms, line, lr, dataset_size)


def features_of(
    model: nn.Module, batch: tuple[Inputs, Tensor], norms: Norms, line: FirstStep, lr: float, dataset_size: int
) -> Features:
    """Return the features of a model whose norms and first step are known."""
    parameters, count = trainable(model).values(), len(batch[1])
    apart = separation(*batch)
    inputs = sum(t.numel() // count for t in Samples.of(batch[0], count).tensors())
    return Features(
        log_p=math.log(sum(p.numel() for p in parameters)),
        log_g2=_log_mean(norms.g2),
        log_tau=_log_mean(norms.tau),
        log_tau_full=None if norms.tau_full is None else _log_mean(norms.tau_full),
        log_n=math.log(dataset_size),
        log_lr=math.log(lr),
        log_b=math.log(len(norms.losses)),
        log_l0=_log(line.l0),
        log_first_step=_log(lr * line.grad_l1 / line.l0),
        log_grad_l1=_log(line.grad_l1),
        log_grad_l2=_log(line.grad_l2),
        line_1=_log(line.after[0] / line.l0),
        line_4=_log(line.after[1] / line.l0),
        line_16=_log(line.after[2] / line.l0),
        log_output_spread=line.log_output_spread,
        log_weakest_layer=line.layers.weakest,
        log_last_share=line.layers.last_share,
        log_move=line.layers.move,
        spread_1=line.spreads[0],
        spread_16=line.spreads[2],
        log_own_16=line.log_own,
        log_layers=math.log(max(1, sum(p.dim() >= 2 for p in parameters))),
        log_inputs=math.log(max(1, inputs)),
        log_outputs=math.log(max(1, line.outputs)),
        draw_noise=line.draw_noise,
        log_steepness=apart.steepness,
        log_hardness=apart.hardness,
        log_flow=apart.flow,
        log_hidden_hardness=line.ends.hidden_hardness,
        log_hidden_size=line.ends.hidden_size,
        log_hidden_pull=line.ends.hidden_pull,
        log_entry_pull=line.ends.entry_pull,
        log_late_share=line.ends.late_share,
    )


@dataclass(frozen=True)
class FirstStep:
    """What AdamW's first update is about to do.

    Attributes:
        l0, grad_l1, grad_l2: the loss and its gradient's norms.
        log_output_spread: see ``signals.output_spread``.
        layers: how that gradient is spread over the layers. ends: what the first and the last weight see.
        after, spreads: the loss after each of ``LINE`` such updates, and how the samples' losses differ then.
        log_own: see ``own_decrease``, at the last of them.
        outputs: numbers that a sample's output has. draw_noise: see ``signals.draw_noise``.
    """

    l0: float
    grad_l1: float
    grad_l2: float
    log_output_spread: float
    layers: LayerSignals
    ends: EndSignals
    after: tuple[float, ...]
    spreads: tuple[float, ...]
    log_own: float
    outputs: int
    draw_noise: float


def first_step(model: nn.Module, batch: tuple[Inputs, Tensor], criterion: Loss, lr: float) -> FirstStep:
    """Look along -lr·sign(∇L) from the initialization, in train mode with one fixed dropout mask (once another).

    Raises:
        ModelError: the loss is not positive and finite.
    """
    x, y, _ = check_batch(batch)
    params = list(trainable(model).values())

    generators = [torch.random.default_generator]
    if y.is_cuda:
        generators.append(torch.cuda.default_generators[y.device.index])

    def outputs_now(seed: int = 0, ends: Ends | None = None) -> Tensor:
        seed_draws(seed, [y.device.index] if y.is_cuda else [])
        given = inputs.again()
        if ends is None:
            return call(model, given)
        with ends:
            return call(model, mark_data(given))

    most = min(torch.finfo(p.dtype).max for p in params)
    if lr * LINE[-1] > most:
        raise SpecError(f"A learning rate of {lr:g} takes the parameters beyond what their type holds ({most:.1e}).")
    with (
        preserved(criterion.beside(model), seed=0, parameters=True),
        torch.inference_mode(False),
        torch.enable_grad(),
        eagerly(),
    ):
        inputs = Untouched(x)
        y = ordinary_tensor(y)
        with running(model, "in train mode"):
            model.train()
            outputs = outputs_now(ends=(ends := Ends(params, len(y), model.buffers())))
        criterion.check(outputs, y)
        draws = any(not torch.equal(g.get_state(), g.manual_seed(0).get_state()) for g in generators)
        loss = criterion.mean(outputs, y)
        if not loss.requires_grad:
            raise ModelError(DETACHED)
        l0 = loss.item()
        if not (math.isfinite(l0) and l0 > 0):
            raise ModelError(f"The loss at initialization must be positive and finite, but it is {l0:.4g}.")
        try:
            grads, seen = ends.gradients(loss, params, outputs, y, l0)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):  # a re-entrant checkpoint goes back by ``backward`` alone
                raise
            outputs = outputs_now(ends=(ends := Ends(params, len(y), model.buffers())))
            grads, seen = ends.gradients(criterion.mean(outputs, y), params, outputs, y, l0, accumulating=True)
        grads = [g.to_dense() if g is not None and g.layout is not torch.strided else g for g in grads]
        graph = ends.differentiates
        del ends
        moving = [(p.detach(), g) for p, g in zip(params, grads, strict=True) if g is not None]
        flat = [as_real(g).flatten(-2) if g.is_complex() else g for _, g in moving]
        gradient = gradient_signals([as_real(p) for p, _ in moving], flat, lr)
        directions = [(as_real(p), as_real(g).sign()) for p, g in moving]
        del grads, moving, flat
        after, moved, done = [], [], 0
        with torch.set_grad_enabled(graph):
            noise = draw_noise(outputs, outputs_now(seed=1)) if draws else 0.0
            for k in LINE:
                for p, direction in directions:
                    p.add_(direction, alpha=-lr * (k - done))
                done = k
                moved.append(outputs_now().detach())
                after.append(criterion.mean(moved[-1], y).item())
        return step_of(criterion, outputs, y, l0, gradient, seen, moved, after, noise)


def gradient_signals(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float
) -> tuple[float, float, LayerSignals]:
    """Return ‖∇L‖₁, ‖∇L‖₂ and how the gradient is spread over the layers, of one model's parameters that have one."""
    sums = size_sums([t.detach() for t in (*gradients, *parameters)]).tolist()
    of_gradients, of_parameters = sums[: len(gradients)], sums[len(gradients) :]
    l1, l2 = sum(size for size, _ in of_gradients), math.sqrt(sum(square for _, square in of_gradients))
    length = math.sqrt(sum(square for _, square in of_parameters))
    return l1, l2, layer_signals(gradients, of_gradients, length, lr)


def step_of(
    criterion: Loss,
    outputs: Tensor,
    targets: Tensor,
    l0: float,
    gradient: tuple[float, float, LayerSignals],
    ends: EndSignals,
    moved: Sequence[Tensor],
    after: Sequence[float],
    noise: float,
) -> FirstStep:
    """Put together what one model's passes have shown: outputs [B, ...] before, and at each of ``LINE`` with losses."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (residual,) = torch.autograd.grad(criterion.per_sample(leaf, targets).sum(), leaf)
    spreads = tuple(spread(criterion.per_sample(there, targets)) for there in moved)
    own = own_decrease(leaf, residual, moved[-1], l0)
    size = leaf.numel() // len(leaf)
    return FirstStep(l0, *gradient[:2], output_spread(leaf), gradient[2], ends, tuple(after), spreads, own, size, noise)


def _log(value: float) -> float:
    """Natural logarithm; a zero becomes the logarithm of the smallest number kept, an overflow stays finite."""
    if math.isnan(value):
        return 700.0  # the loss overflowed along the line: as bad as it gets
    return math.log(min(max(value, _TINY), 1e300))


def _log_mean(values: Tensor) -> float:
    return _log(float(values.mean()))
