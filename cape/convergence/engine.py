"""Which engine runs a trial, and how many trials share a stack: rules taken from measurements, for each kind of device.

The choice follows from the model and the device alone, never from how many trials wait or how fast they are today,
wherever two engines differ in rounding: a trial's numbers are the same in every run.

Measured on two cores (AMD EPYC 9004, torch 2.14, float32; ms for one step of one trial, plain engine against stack):

==============================  ==========  =====================  ===============================
model, B                        plain       stack of 1, 2, 8       so
==============================  ==========  =====================  ===============================
MLP 784-128x2, 32               1.67        1.28, 0.74, 0.47       stack
MLP 3072-1024x2, 32             10.7        10.0, 9.3, 8.2 (of 4)  stack
MLP 3072-256x3, 128             8.4         9.0, 6.7, 5.6          stack, from two trials on
GRU 1x128, 32                   13.0        9.9, 7.1, 5.5          stack
GRU 1x256 both directions, 32   47.9        20.3, 17.2, 12.9       stack
LSTM 1x256 both directions, 32  31.1        26.3, 20.1, 17.1       stack
LSTM 2x256, 32                  36.8        59.2, 48.4, 44.2       plain: oneDNN's cell is better
LSTM 3x256 both directions, 32  143.9       172, 143, 133          plain: a stack of one loses
ViT 192/6/3, 32                 186         255, 297               plain: the cores are full
VGG 32/64/128, 32               13.4        14.5, 17.4 (of 4)      plain
MobileNetV2 0.5, 32             37.0        47.2, 44.5 (of 4)      plain
==============================  ==========  =====================  ===============================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cape.convergence.convert import Unstackable, layers_of
from cape.convergence.stack import LayerStack, Stack, Subject
from cape.convergence.vmapped import VmapStack
from cape.families.rnn import RecurrentNet
from cape.tasks import Loss

# What a stack may hold on a CPU, and how many trials at most: beyond, a trial's step became no cheaper.
_CPU_BYTES = 256 * 2**20
_CPU_WIDEST = 16
_CPU_WIDEST_RECURRENT = 8
# The share of a device's free memory that a stack may take, and a width beyond which a launch costs nothing any more.
_DEVICE_SHARE = 0.7
_DEVICE_WIDEST = 256
# Stacks that train side by side, each on a stream of its own, where all of them together are no wider than one may be.
_LANES = 4


def single_because(subject: Subject, precision: str, count: int) -> str | None:
    """Return why ``count`` trials like this one run faster singly, or None where a stack is faster.

    On a GPU a stack always is; ``make_stack`` says where there is none.
    """
    if subject.batch[1].device.type != "cpu":
        return None
    if precision == "bf16":
        return "stacked layers compute in float32"
    model = subject.model
    if isinstance(model, RecurrentNet):
        if isinstance(model.rnn, nn.GRU) or (model.rnn.bidirectional and model.rnn.num_layers <= 2):
            return None
        return "on a CPU the fused LSTM cell is as fast"
    why = _no_layers(model)
    if why is not None:
        return f"{why}, and on a CPU vmap is no faster than one at a time"
    # Dense layers are the same bit for bit in both engines, so that here the number of trials may decide.
    return None if count > 1 else "it is the only one of its kind"


def same_bits(subject: Subject) -> bool:
    """Return whether a float32 stack of trials like this one computes what ``measure`` computes, bit for bit."""
    on_cpu = subject.batch[1].device.type == "cpu"
    return on_cpu and not isinstance(subject.model, RecurrentNet) and _has_layers(subject.model)


def make_stack(subject: Subject, criterion: Loss, capacity: int, precision: str) -> Stack:
    """Return an empty stack for trials like this one.

    Raises:
        Unstackable: there is none; the message says why.
    """
    _refuse(subject, criterion)
    if subject.batch[1].shape[0] == 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in subject.model.modules()
    ):
        raise Unstackable("it has batch norms, and a batch of one sample")
    if precision != "bf16" and _has_layers(subject.model):
        return LayerStack(layers_of(subject.model, capacity), subject, criterion, capacity)
    return VmapStack(subject, criterion, capacity, precision)


def width_for(subject: Subject, criterion: Loss, precision: str, lanes: int = 1) -> int:
    """Return how many trials like this one a stack should hold: what memory allows, up to what makes it faster.

    Args:
        lanes: stacks that share a device's memory.

    Raises:
        Unstackable: as ``make_stack``.
    """
    _refuse(subject, criterion)
    needed = _bytes_per_trial(subject, criterion, precision)
    device = subject.batch[1].device
    if device.type == "cpu":
        recurrent = isinstance(subject.model, RecurrentNet)
        return max(2, min(_CPU_WIDEST_RECURRENT if recurrent else _CPU_WIDEST, _CPU_BYTES // needed))
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_DEVICE_WIDEST // lanes, int(free * _DEVICE_SHARE) // lanes // needed))


def lanes_for(count: int, device: torch.device) -> int:
    """Return how many groups of ``count`` trials, each of a model of its own, should train side by side.

    More than one where the trials of a group are too few to fill a GPU: while the host builds, probes or looks at the
    trials of one stack, the device makes the steps of the others. A group that may be as wide as a stack gets the
    device alone: split in two it would only take twice the launches.
    """
    return _LANES if device.type == "cuda" and count <= _DEVICE_WIDEST // _LANES else 1


def _refuse(subject: Subject, criterion: Loss) -> None:
    if not criterion.is_named:
        raise Unstackable(f"the loss '{criterion.name}' is not one of the named ones")
    if not isinstance(subject.batch[0], Tensor):
        raise Unstackable("it takes more than one input")
    if subject.batch[1].device.type not in ("cpu", "cuda"):
        raise Unstackable(f"there is no fused AdamW for the device '{subject.batch[1].device.type}'")


def _has_layers(model: nn.Module) -> bool:
    return _no_layers(model) is None


def _no_layers(model: nn.Module) -> str | None:
    """Return why a model is no chain of stacked layers, or None where it is."""
    try:
        layers_of(model, 0)
    except Unstackable as why:
        return str(why)
    return None


def _bytes_per_trial(subject: Subject, criterion: Loss, precision: str) -> int:
    """Return what one trial takes in a stack: four times its parameters, and what a backward pass needs.

    On a GPU that is measured, by one step of a stack of one. On a CPU it is reckoned, since the first touch of memory
    would cost more than the answer is worth.
    """
    model, device = subject.model, subject.batch[1].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        stack = make_stack(subject, criterion, 1, precision)
        with torch.no_grad():
            stack.load(subject)
            stack.forward()
            stack.losses()
            stack.update()
        return max(1, torch.cuda.max_memory_allocated(device) - before)
    needed = 4 * sum(p.nbytes for p in model.parameters())
    if isinstance(model, RecurrentNet):
        rnn = model.rnn
        states = rnn.hidden_size * rnn.num_layers * (2 if rnn.bidirectional else 1)
        positions = subject.batch[1].shape[0] * subject.batch[0].shape[1]
        needed += 12 * states * positions * 4  # gates, their gradients, states: 12 numbers for each unit and position
    elif not _has_layers(model):
        return max(needed, _CPU_BYTES // 4)  # vmap on a CPU: no rule chooses it, and four at a time serve whoever does
    return needed
