"""The factor that keeps gradients in fp16 from vanishing.

Micikevicius et al. 2018, arXiv 1710.03740, section 3.2; that it comes back after 2,000 steps is
NVIDIA's recipe ("Training with Mixed Precision") and torch's default.
"""

import torch
from torch import Tensor

# Where it begins in fp16, and the most that it comes back to.
LARGEST = 2.0**16
# Finite steps in a row.
DOUBLES_AFTER = 2000


class LossScale:
    """A factor of the loss, 1 where gradients need none: halved by an overflow, later doubled.

    An overflow costs its step. So a scale that has been too large once is tried again only after
    many steps, and one that never came back would be at 1 after sixteen single overflows. Both
    numbers, `value` and the count of `finite_steps` in a row, stay on the device: the host waits
    for neither.
    """

    def __init__(self, device: torch.device, value: float = 1.0, finite_steps: int = 0) -> None:
        self.value = torch.tensor(value, device=device)
        self.finite_steps = torch.tensor(finite_steps, device=device)

    def update(self, spoilt: Tensor) -> None:
        """Follow a step; the flag `spoilt` is 1 where its loss or gradient was not finite."""
        finite = spoilt == 0
        steps = (self.finite_steps + 1) * finite
        factor = torch.where(finite, 1 + (steps == DOUBLES_AFTER).float(), 0.5)
        self.value = (self.value * factor).clamp(1.0, LARGEST)
        self.finite_steps = steps % DOUBLES_AFTER
