"""Output heads of ranking models: a stack of layers, or an ensemble of such stacks (TabM).

TabM: Gorishniy et al. 2025, arXiv 2410.24210; BatchEnsemble: arXiv 2002.06715.
Shapes: K members, B batch, I and O units of a layer, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.content.dropout import Dropout
from recsys.ranking.settings import HeadSettings
from recsys.ranking.vectors import MemberLogits


class EnsembleLinear(nn.Module):
    """A linear map that K members share: `((x * scale_in) @ weight) * scale_out + bias`.

    `scale_in` starts as random signs, or without `signs` at 1, like `scale_out`.
    """

    def __init__(self, num_inputs: int, num_outputs: int, members: int, signs: bool) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        input_scale = torch.ones(members, 1, num_inputs)
        if signs:
            input_scale = torch.randint_like(input_scale, 2) * 2 - 1
        self.scale_in = nn.Parameter(input_scale)
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs).uniform_(-bound, bound))
        self.scale_out = nn.Parameter(torch.ones(members, 1, num_outputs))
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K or 1, B, I] -> [K, B, O]
        return torch.matmul(inputs * self.scale_in, self.weight) * self.scale_out + self.bias

    def folded(self) -> tuple[Tensor, Tensor]:  # [I, K, O], [K, O]
        scale_in = self.scale_in.permute(2, 0, 1).contiguous()  # [I, K, 1]
        weight = scale_in * (self.weight.unsqueeze(1) * self.scale_out.squeeze(1))
        return weight, self.bias.squeeze(1)


class MemberLinear(nn.Module):
    """A linear map of each member: the last layer."""

    def __init__(self, num_inputs: int, num_outputs: int, members: int) -> None:
        super().__init__()
        bound = num_inputs**-0.5
        weight = torch.empty(members, num_inputs, num_outputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(members, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:  # [K, B, I] -> [K, B, O]
        return torch.baddbmm(self.bias, inputs, self.weight)

    def folded(self) -> tuple[Tensor, Tensor]:  # [I, K, O], [K, O]
        return self.weight.transpose(0, 1), self.bias.squeeze(1)


class EnsembleHead(nn.Module):
    """K MLPs with `units` and ReLU over the same features; dropout is drawn for each member."""

    def __init__(
        self, width: int, units: list[int], num_outputs: int, members: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count in units:
            linear = EnsembleLinear(width, count, members, signs=not layers)
            layers += [linear, nn.ReLU(), Dropout(dropout)]
            width = count
        self.members = members
        self.layers = nn.Sequential(*layers, MemberLinear(width, num_outputs, members))

    def forward(self, features: Tensor) -> MemberLogits | Tensor:  # [B, width] -> [B, C]
        """Return the logits [K, B, C] of the members in training, else their mean [B, C]."""
        if not self.training:
            return _mean_logits(features, self.folded())
        return MemberLogits(self.layers(features.expand(self.members, -1, -1)))

    def folded(self) -> list[tuple[Tensor, Tensor]]:  # [I, K, O], [K, O] of each layer
        layer_types = EnsembleLinear | MemberLinear
        return [layer.folded() for layer in self.layers if isinstance(layer, layer_types)]

    def packaged(self, bfloat16: bool) -> FoldedHead:
        """Return the head of a package; with `bfloat16` all layers but the last compute in it."""
        *hidden, last = self.folded()
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return FoldedHead([tensor.to(dtype) for pair in hidden for tensor in pair] + list(last))


class FoldedHead(nn.Module):
    """An `EnsembleHead` in evaluation, whose weights and biases are folded once."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(weight.detach().contiguous(), requires_grad=False) for weight in weights
        )

    def forward(self, features: Tensor) -> Tensor:  # [B, width] -> [B, C]
        return _mean_logits(features, list(zip(self.weights[::2], self.weights[1::2])))


def _mean_logits(features: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:  # [B, C]
    """Return the members' mean logits, without a scaled copy of a layer's inputs."""
    (weight, bias), *later_layers = layers
    hidden = torch.addmm(bias.flatten(), features.to(weight.dtype), weight.flatten(1))
    members = hidden.unflatten(1, bias.shape).transpose(0, 1)  # [K, B, O]
    for weight, bias in later_layers:
        inputs = members.relu_().to(weight.dtype)
        members = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(0, 1))
    return members.mean(0)


def hidden_layers(width: int, units: list[int], dropout: float) -> tuple[list[nn.Module], int]:
    """Return a linear map, ReLU and dropout for each of `units`, and the output width."""
    layers: list[nn.Module] = []
    for count in units:
        layers += [nn.Linear(width, count), nn.ReLU(), Dropout(dropout)]
        width = count
    return layers, width


def multilayer_perceptron(
    width: int, units: list[int], dropout: float, num_outputs: int
) -> nn.Sequential:
    """Return `hidden_layers`, then a linear map."""
    layers, width = hidden_layers(width, units, dropout)
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def ranking_head(
    width: int, settings: HeadSettings, num_outputs: int, drops_inputs: bool = False
) -> nn.Sequential:
    """Return a `multilayer_perceptron`, or an ensemble of `settings.ensemble_members` of them."""
    units, members, dropout = settings.mlp_units, settings.ensemble_members, settings.dropout
    first = [Dropout(dropout)] if drops_inputs else []
    if members == 1:
        return nn.Sequential(*first, *multilayer_perceptron(width, units, dropout, num_outputs))
    return nn.Sequential(*first, EnsembleHead(width, units, num_outputs, members, dropout))
