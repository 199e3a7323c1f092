"""Small networks and data sets, and the brute force that judges the package: the explicit linear model under torch.optim."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


class Tied(nn.Module):
    """The second layer is the transpose of the first by name only: two layers share one weight tensor."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Twice(nn.Module):
    """One layer is called twice."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Unused(nn.Module):
    """One trainable parameter has no influence on the outputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = mlp(outputs)
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ConvNet(nn.Module):
    """A convolution, BatchNorm and dropout before a linear layer; inputs are reshaped from six numbers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, outputs)
        self.norm.running_mean.copy_(torch.randn(4) * 0.1)
        self.norm.running_var.copy_(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.reshape(-1, 1, 2, 3))).relu()
        return self.head(self.dropout(x.flatten(1)))


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def frozen(outputs: int) -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))
    module[0].requires_grad_(False)
    return module


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "conv": ConvNet,
    "twice": Twice,
    "tied": Tied,
    "frozen": frozen,
    "unused": Unused,
}


def half_sum_per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": nn.MSELoss(),
    "sum": nn.MSELoss(reduction="sum"),
    "half_sum_per_sample": half_sum_per_sample,
}


def make(network: str, outputs: int = 3, samples: int = 11, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 network in train mode, inputs `(N, 6)` and targets `(N, K)`; N is odd."""
    torch.manual_seed(seed)
    module = NETWORKS[network](outputs).double()
    return module, torch.randn(samples, 6).double(), torch.randn(samples, outputs).double()


class LinearModel:
    """f0 + J (w - w0) with an explicit J `(N K, P)`, computed without the package."""

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        modes = {m: m.training for m in module.modules()}
        module.eval()
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        parameters = dict(module.named_parameters())
        self.shapes = [parameters[name].shape for name in self.names]
        self.start = torch.cat([parameters[name].detach().flatten() for name in self.names])

        def outputs(flat: Tensor) -> Tensor:
            return functional_call(module, self.unflatten(flat), (inputs,))

        self.outputs = outputs(self.start).detach()
        self.jacobian = jacrev(outputs)(self.start).detach().reshape(self.outputs.numel(), -1)
        for submodule, training in modes.items():
            submodule.training = training

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {n: part.reshape(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def predict(self, weights: Tensor) -> Tensor:
        return self.outputs + (self.jacobian @ (weights - self.start)).reshape(self.outputs.shape)

    def train(
        self,
        targets: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        steps: int,
        lr: float | Callable[[int], float],
        **options: float,
    ) -> Tensor:
        """Weights after `steps` steps of torch.optim.SGD on the linear model."""
        weights = self.start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weights], lr=0.0, **options)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr(step) if callable(lr) else lr
            optimizer.zero_grad()
            loss(self.predict(weights), targets).backward()
            optimizer.step()
        return weights.detach()

    def fit(
        self,
        steps: Sequence[Sequence[Tensor]],
        targets: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        make_optimizer: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
        *,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        unused: Sequence[str] = (),
    ) -> Tensor:
        """Weights after steps of any optimizer on the linear model's parameters, one tensor each.

        A step is a sequence of index tensors, the rows of minibatches whose gradients are accumulated with weight
        1/n. The schedule, if any, advances after every step. Gradients of `unused` parameters are None.
        """
        weights = {n: part.clone().requires_grad_() for n, part in self.unflatten(self.start).items()}
        optimizer = make_optimizer(weights)
        held = [weight for group in optimizer.param_groups for weight in group["params"]]
        scheduler = schedule(optimizer) if schedule else None
        for batches in steps:
            for weight in weights.values():
                weight.grad = None
            for rows in batches:
                outputs = self.predict(torch.cat([weight.flatten() for weight in weights.values()]))[rows]
                (loss(outputs, targets[rows]) / len(batches)).backward()
            for name in unused:
                weights[name].grad = None
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(held, clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(held, clip_value)
            optimizer.step()
            if scheduler:
                scheduler.step()
        return flatten({name: weight.detach() for name, weight in weights.items()})

    def minimum_norm(self, targets: Tensor) -> Tensor:
        residual = (targets - self.outputs).flatten()
        return self.start + torch.linalg.pinv(self.jacobian, rtol=1e-10) @ residual


def flatten(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in weights.values()])


def relative_error(actual: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    return ((actual - expected).norm() / (expected - origin).norm()).item()


# PyTorch 2.9 brought the newer interface, and raises when the older one is mixed in.
FULL = "ieee" if hasattr(torch.backends.cudnn, "conv") else "highest"


def precisions_of_products() -> set[str]:
    """The precisions in which float32 products run now; only `FULL` if no product runs in fewer digits."""
    if FULL == "ieee":
        return {switch.fp32_precision for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)}
    return {torch.get_float32_matmul_precision(), "tf32" if torch.backends.cudnn.allow_tf32 else FULL}
