"""The loss of identities: cross-entropy of the classifier, and batch-hard triplets of the features before the neck

Triplets: `In Defense of the Triplet Loss for Person Re-Identification` (2017) - https://arxiv.org/abs/1703.07737,
by pytorch-metric-learning.

Shape letters: B batch, C features, K identities.
"""
from typing import Any

import torch
from torch import nn

from dreal_timm.models.reid import ReidNetwork

__all__ = ['IdentityLoss']


class IdentityLoss(nn.Module):
    """A criterion for timm's tasks: the logits come as its argument, the features from where they enter the neck.

    They are those of the last pass in training mode that has gradients; a criterion is called once for each.

    Args:
        model: The network, which is watched from now on.
        smoothing: Label smoothing of the cross-entropy.
        margin: Margin of the triplet loss, in euclidean distance.
        triplet_weight: Weight of the triplet loss; 0 leaves the cross-entropy.

    Raises:
        ModuleNotFoundError: pytorch-metric-learning is not installed.
    """

    def __init__(
            self,
            model: ReidNetwork,
            smoothing: float = 0.1,
            margin: float = 0.5,
            triplet_weight: float = 1.0,
    ):
        super().__init__()
        try:
            from pytorch_metric_learning.distances import LpDistance
            from pytorch_metric_learning.losses import TripletMarginLoss
            from pytorch_metric_learning.miners import BatchHardMiner
            from pytorch_metric_learning.reducers import MeanReducer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'Training of re-identification needs the package {error.name}: pip install "dreal_timm[reid]"'
            ) from error
        self.classification = nn.CrossEntropyLoss(label_smoothing=smoothing)
        distance = LpDistance(normalize_embeddings=False)
        self.miner = BatchHardMiner(distance=distance)
        # the mean over all anchors; by default those without a violation would be left out
        self.triplet = TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())
        self.triplet_weight = triplet_weight
        self.parts: dict[str, torch.Tensor] = {}
        self._features: torch.Tensor | None = None
        model.neck.register_forward_pre_hook(self._keep)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the network copies its hook, and with it this; features with a graph cannot be copied
        return {**self.__dict__, '_features': None, 'parts': {}}

    def _keep(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._features = args[0]

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss; `parts` then has both of its terms, detached and without their weights.

        Args:
            output: Logits, (B, K).
            target: Identities, (B,).

        Raises:
            RuntimeError: No pass of the network in training mode came before, or one of another batch.
        """
        features, self._features = self._features, None
        identity: torch.Tensor = self.classification(output.float(), target)
        if not (torch.is_grad_enabled() and output.requires_grad):
            return identity  # an evaluation
        if features is None or len(features) != len(output):
            raise RuntimeError('The loss of identities was called without a pass of its network before it.')
        with torch.autocast(output.device.type, enabled=False):
            features = features.float()
            triplet: torch.Tensor = self.triplet(features, target, self.miner(features, target))
        self.parts = {'id_loss': identity.detach(), 'triplet_loss': triplet.detach()}
        return identity + self.triplet_weight * triplet
