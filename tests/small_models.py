"""Models of a few hundred parameters, and update masks for them, that the tests of training share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DEVICES = ("cpu", "cuda")


class TokenModel(torch.nn.Module):
    """Embedding, hidden layer, head; rows of tokens that never occur have no gradient."""

    def __init__(self, *, vocabulary: int = 11, width: int = 6, hidden: int = 9, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.up = torch.nn.Linear(width, hidden)
        self.down = torch.nn.Linear(hidden, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.down(torch.tanh(self.up(self.embed(tokens)))))


def token_model(seed: int, *, dtype: torch.dtype = torch.float32, **options) -> TokenModel:
    """A model whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TokenModel(**options).to(dtype)


def loss_of(model: torch.nn.Module, seed: int, *, scale: float = 1.0) -> torch.Tensor:
    """Cross-entropy on tokens below 8, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = torch.randint(0, 8, (2, 7), generator=generator).to(device)
    logits = model(tokens[:, :-1]).float()
    return scale * torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def random_mask(model: torch.nn.Module, seed: int, *, density: float = 0.3) -> dict[str, torch.Tensor]:
    """Bits for every parameter, with at least one set and one clear in each."""
    generator = torch.Generator().manual_seed(seed)
    mask = {}
    for name, parameter in model.named_parameters():
        bits = torch.rand(parameter.shape, generator=generator) < density
        bits.view(-1)[0], bits.view(-1)[-1] = True, False
        mask[name] = bits.to(parameter.device)
    return mask


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Stored codes, a copy on the CPU."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(width).cpu().clone()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Codes of every parameter."""
    return {name: bits_of(parameter) for name, parameter in model.named_parameters()}


def outside_is_equal(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], mask: Mapping[str, torch.Tensor]
) -> bool:
    """Whether no entry outside the mask changed a bit."""
    return all(torch.equal(before[n][~mask[n].cpu()], after[n][~mask[n].cpu()]) for n in before)


def changed_inside(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], mask: Mapping[str, torch.Tensor]
) -> int:
    """Entries inside the mask that changed."""
    return sum(int((before[n] != after[n])[mask[n].cpu()].sum()) for n in before)


def module_of(weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module without a forward pass whose parameters have these names."""
    root = torch.nn.Module()
    for name, values in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(values.clone()))
    return root
