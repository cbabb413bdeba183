"""What the fused loss's operators do on a CPU, which has no kernels of them: Triton's, interpreted, or the formulas."""

import contextlib

import torch

from codeparrot_ds.model.fused_loss import fused_loss_works


@contextlib.contextmanager
def kernels_on_cpu(losses, gradient):
    """The two operators with these functions as their CPU kernels, and nothing known of whether they work."""
    library = torch.library.Library("codeparrot_ds", "IMPL")
    library.impl("token_losses", losses, "CPU")
    library.impl("logits_gradient_", gradient, "CPU")
    fused_loss_works.cache_clear()
    try:
        yield
    finally:
        library._destroy()
        fused_loss_works.cache_clear()


def losses_by_formula(logits, targets):
    wide = logits.float()
    largest = wide.max(1).values
    log_total = (wide - largest[:, None]).exp().sum(1).log()
    logit = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.where(targets == -100, 0.0, log_total - (logit - largest))
    return losses, torch.stack([largest, log_total], 1)


def gradient_by_formula(logits, targets, statistics, scale):
    largest, log_total = statistics[:, :1], statistics[:, 1:]
    gradient = (logits.float() - largest - log_total).exp()
    gradient[torch.arange(len(targets)), targets.clamp(min=0)] -= 1
    logits.copy_(gradient * torch.where(targets == -100, 0.0, scale)[:, None])
