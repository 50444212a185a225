"""Generalized-mean pooling (GeM)

Paper: `Fine-tuning CNN Image Retrieval with No Human Annotation` (TPAMI 2018) - https://arxiv.org/abs/1711.02512
"""
import torch
from torch import nn

__all__ = ['GemPool']


class GemPool(nn.Module):
    """Mean of the p-th powers over the positions, and its p-th root; p = 1 is the mean of what is positive.

    Args:
        p: Exponent that training starts from; it is learned.
        eps: Least value that a feature counts as.
    """

    def __init__(
            self,
            p: float = 3.0,
            eps: float = 1e-6,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (B, C, H, W) to (B, C), in float32 at least."""
        dtype = x.dtype
        x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        p = self.p.to(x.dtype)
        return x.clamp(min=self.eps).pow(p).mean((2, 3)).pow(1 / p).to(dtype)
