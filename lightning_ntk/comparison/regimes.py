"""The panel of regimes: the kernel and features of a few samples."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference, evenly_spaced_rows
from lightning_ntk.data.targets import match_targets
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.dynamics.stability import max_learning_rate
from lightning_ntk.functional.regimes import change_sums, low_rank_measure, rank_of
from lightning_ntk.functional.trace import Estimate, KernelMoments, ProbeVectors, gram_matrices, interval, probe_vectors
from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.linearization.activations import activations_of
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors, plain_name
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.solvers.lanczos import LanczosProcess
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.memory import format_bytes
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.validation import require_integer

# Copies of the pulled-back vectors that exist at a time, in float64: the vectors, and the sums over batches.
_COPIES = 2
# Vectors that are constant over the samples, from which the start of Lanczos is chosen.
_MOST_CONSTANT = 10
_ROUNDING = 1e-10
_RANDOM_PART = 0.3


class RegimePanel:
    r"""Measures the kernel, the curvature and the features at weights w_t.

    The scalars are alignment, trace and rank of the kernel, the edge of stability, and rank and change of features.

    The kernel is that of a few evenly spaced samples of the reference, probed with products alone, in eval mode and with the
    buffers of w_t. Lanczos finds :math:`\lambda_\text{max}(J^\top H J)`; its images span the space on which trace and norm are
    exact, and random vectors estimate the rest, see `lightning_ntk.functional.trace`. Their signs are the same at every
    measurement and in every process. Features are measured on more samples, since they take only a forward pass.

    Args:
        linearization: The network at its initial weights.
        reference: The data set from which the samples are taken.
        loss: Maps outputs and targets to one number.
        samples: Number of samples for the kernel; all of them if there are fewer.
        feature_samples: Number of samples for features and activations, likewise.
        products: Products for the largest eigenvalue.
        random: Number of random vectors.
        seed: What the random numbers start from.
        processes: The processes of the run, which all measure the same, with the buffers of the first one.

    Raises:
        ValueError: If the samples have no targets that can stand beside the outputs, or if the loss cannot be differentiated
            twice.
        MemoryError: If the vectors do not fit.

    Example:
        >>> module, inputs, targets = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> panel = RegimePanel(Linearization(module), Reference((inputs, targets)), torch.nn.MSELoss())
        >>> scalars = panel.measure(dict(module.named_parameters()))
        >>> round(scalars["regime/trace"], 6), round(scalars["regime/effective_rank"], 6)  # [[2, 1], [1, 2]]
        (4.0, 1.6)
    """

    def __init__(
        self,
        linearization: Linearization,
        reference: Reference,
        loss: Loss,
        *,
        samples: int = 32,
        feature_samples: int = 256,
        products: int = 8,
        random: int = 24,
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        for name, value, least in (
            ("samples", samples, 1), ("feature_samples", feature_samples, 1), ("products", products, 2), ("random", random, 3),
        ):  # fmt: skip
            require_integer(name, value, least=least)
        self._linearization, self._processes = linearization, processes
        self._products, self._random, self._seed = products, random, seed
        self._features = reference.subset(evenly_spaced_rows(len(reference), feature_samples))
        probe = reference.subset(evenly_spaced_rows(len(reference), samples))
        batch = probe.read(0, len(probe))
        if batch.target is None:
            raise ValueError(
                "Expected samples with targets for the panel of regimes but their batches hold inputs only."
            )
        outputs = linearization.predict(batch.inputs)
        self._probe = Reference((batch.inputs, batch.target), batch_size=reference.batch_size)
        self._targets = match_targets(batch.target.cpu(), outputs.cpu(), flat=linearization.flat)
        self._objective = Objective(loss, outputs, batch.target, flat=linearization.flat)
        self._is_mean = self._looks_like_mean(outputs.cpu())
        self._require_memory(outputs.shape[1])

    def measure(self, weights: Mapping[str, Tensor], settings: SGDSettings | None = None) -> dict[str, float]:
        """Measures the panel.

        Args:
            weights: The weights w_t, and buffers, by name; without buffers, those of `linearization` count.
            settings: The settings of the steps of SGD, for the edge of stability; None where they are not known, or another
                optimizer steps.

        Returns:
            The scalars by name, see docs/scalars.md.

        Raises:
            ValueError: If the weights are not finite.
        """
        own = {name: weights[name] for name in self._linearization.params}
        for name, value in own.items():
            if not value.isfinite().all():
                raise ValueError(f"Expected finite weights but `{name}` holds NaN or infinity: it has no kernel.")
        buffers = {name: weights[name] for name in self._linearization.buffers if name in weights}
        network = self._linearization.at(own, buffers or None)
        network.share_buffers(self._processes)
        passes = DataPasses(network, self._probe)
        outputs = passes.predict()
        jacobian = StreamedJacobian(passes, outputs)
        generator = torch.Generator().manual_seed(self._seed)
        curvature, of_halves, images = self._curvature(network, jacobian, outputs, generator)
        scalars = curvature.scalars("regime/curvature")
        if self._is_mean and len(outputs) > 1:
            scalars["regime/curvature_of_halves"] = of_halves
        if settings is not None and self._is_mean:
            edge = [settings.lr / limit if (limit := max_learning_rate(settings, k)) else torch.inf for k in curvature]
            scalars |= Estimate(*edge).scalars("regime/edge")
        vectors = probe_vectors(images, self._random, generator)
        return scalars | self._kernel(network, jacobian, vectors) | self._feature_scalars(network)

    def _curvature(
        self, network: Linearization, jacobian: StreamedJacobian, outputs: Tensor, generator: torch.Generator
    ) -> tuple[Estimate, float, Tensor]:
        r"""Computes :math:`\lambda_\text{max}(J^\top H J)` by Lanczos in weight space.

        Also returns the mean over both halves of the samples, within the Krylov space, and the images J v of all vectors.
        """
        shapes = {name: p.shape for name, p in network.params.items()}
        targets = self._objective.targets.to(outputs.device)

        def hessian(vector: Tensor) -> Tensor:
            return self._objective.hessian_product(outputs, targets, vector)

        # Vectors that are constant over the samples: there the kernel of a network at initialization is largest.
        width = outputs.shape[1]
        levels = torch.eye(width, dtype=torch.float64)
        if width > _MOST_CONSTANT:
            levels = torch.linalg.qr(torch.randn(width, _MOST_CONSTANT, generator=generator, dtype=torch.float64))[0].T
        block = levels.unsqueeze(1).expand(-1, len(outputs), -1).to(outputs.device)
        krylov = LanczosProcess(_start(jacobian, hessian, block, generator))
        products: list[tuple[Tensor, Tensor]] = []
        while krylov.num_products < self._products and not krylov.exhausted:
            image = jacobian.jvp(_by_name(krylov.newest, shapes))
            products.append((image, curved := hessian(image)))
            krylov.add(_flat(jacobian.vjp(curved.unsqueeze(0)), 0))
        images, curvatures = (torch.stack(each) for each in zip(*products, strict=True))
        modes = krylov.modes()
        largest = modes.eigenvalues[-1].item()
        estimate = Estimate(largest, largest, modes.largest_eigenvalue)
        return estimate, _of_halves(images, curvatures), torch.cat([block, images])

    def _kernel(self, network: Linearization, jacobian: StreamedJacobian, vectors: ProbeVectors) -> dict[str, float]:
        targets, device = self._targets, network.device
        centered = targets - targets.mean(0)
        pulled = jacobian.vjp(torch.cat([vectors.vectors, torch.stack([targets, centered])]).to(device))
        grams = gram_matrices(pulled)
        gram = _summed(grams)
        square, centered_square = targets.square().sum(), centered.square().sum()
        moments, around = vectors.moments(gram[:-2, :-2]), vectors.centered_moments(gram[:-2, :-2])
        scalars = interval(moments.trace, moments.known_trace).scalars("regime/trace")
        scalars |= interval(rank_of(moments.trace, moments.square)).scalars("regime/effective_rank")
        scalars |= _alignment(gram[-2, -2], square, moments).scalars("regime/alignment")
        scalars |= _alignment(gram[-1, -1], centered_square, around).scalars("regime/centered_alignment")
        layers: dict[str, Tensor] = {}
        for name, own in grams.items():
            layer = plain_name(name).rpartition(".")[0] or name
            layers[layer] = layers.get(layer, 0) + own
        for layer, own in layers.items():
            moments, around = vectors.moments(own[:-2, :-2]), vectors.centered_moments(own[:-2, :-2])
            prefix = f"regime/layer/{layer}"
            scalars |= _alignment(own[-2, -2], square, moments).scalars(f"{prefix}/alignment")
            estimate = _alignment(own[-1, -1], centered_square, around)
            scalars |= estimate.scalars(f"{prefix}/centered_alignment")
        return scalars

    def _feature_scalars(self, network: Linearization) -> dict[str, float]:
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
        features, outputs = [], []
        for batch in self._features.batches():
            start, now = activations_of(self._linearization, batch.inputs), activations_of(network, batch.inputs)
            for layer in start.layers.keys() & now.layers.keys():
                if start.layers[layer].shape == now.layers[layer].shape:
                    sums.setdefault(layer, []).append(change_sums(start.layers[layer], now.layers[layer]))
            outputs.append(now.outputs)
            if now.features is not None:
                features.append(now.features)
        scalars = {}
        if len(features) == len(outputs):
            scalars["regime/low_rank"] = low_rank_measure(torch.cat(features), torch.cat(outputs))
        for layer in sorted(sums):
            changed, initial = (torch.stack(squares).sum() for squares in zip(*sums[layer], strict=True))
            scalars[f"regime/layer/{layer}/activation_change"] = ratio_of_norms(changed, initial).item()
        return scalars

    def _looks_like_mean(self, outputs: Tensor) -> bool:
        """Whether the loss looks like a mean over samples.

        A few samples then determine the curvature of all.
        """
        targets = self._objective.targets
        try:
            self._objective.hessian_product(outputs, targets, torch.ones_like(outputs))
            once = self._objective.value(outputs, targets)
            twice = self._objective.value(torch.cat([outputs, outputs]), torch.cat([targets, targets]))
        except RuntimeError as error:
            raise ValueError(
                f"Expected a loss that can be differentiated twice, for the edge of stability, but it failed: {error}. "
                "Leave out `regime`, or give another `loss`."
            ) from error
        return bool((twice - once).abs() <= 1e-6 * once.abs())

    def _require_memory(self, outputs: int) -> None:
        vectors = self._products + min(_MOST_CONSTANT, outputs) + 2 * self._random + 2
        size = _COPIES * 8 * vectors * self._linearization.num_parameters
        if size > (free := self._processes.free_memory(self._linearization.device)):
            raise MemoryError(
                f"The panel of regimes needs {format_bytes(size)} for {vectors} vectors of the size of the weights but "
                f"{format_bytes(free)} are free. Leave out `regime`."
            )

    def __repr__(self) -> str:
        return represent(
            self,
            f"kernel of {len(self._probe)} samples",
            f"features of {len(self._features)}",
            f"{self._random} random vectors",
        )


def _start(
    jacobian: StreamedJacobian, hessian: Callable[[Tensor], Tensor], block: Tensor, generator: torch.Generator
) -> Tensor:
    r"""Makes a starting vector with which Lanczos needs few products.

    The matrix is :math:`J^\top H J`.

    With a block B of vectors, the eigenvector of :math:`B^\top H J J^\top H B\, b = \lambda B^\top H B\, b` gives the best start
    :math:`J^\top H B b`, without a forward-mode pass. A random part makes sure that nothing is missed.
    """
    curved = torch.stack([hessian(vector) for vector in block])
    random = torch.randn(1, *block.shape[1:], generator=generator, dtype=torch.float64).to(block)
    pulled = jacobian.vjp(torch.cat([curved, random]))
    gram = _summed(gram_matrices(pulled))[:-1, :-1]
    sizes, basis = torch.linalg.eigh((block.flatten(1) @ curved.flatten(1).T).cpu())
    kept = sizes > _ROUNDING * sizes.abs().max()
    start = _unit(_flat(pulled, -1))
    if kept.any():
        whitened = basis[:, kept] / sizes[kept].sqrt()
        largest = whitened @ torch.linalg.eigh(whitened.T @ gram @ whitened)[1][:, -1]
        best = torch.stack([share * _flat(pulled, i) for i, share in enumerate(largest.tolist())]).sum(0)
        start = _unit(best) + _RANDOM_PART * start
    return start


def _of_halves(images: Tensor, curved: Tensor) -> float:
    r"""The largest curvature of half of the samples, a mean over both halves.

    The products are J v and H J v for an orthonormal basis of vectors v, `(T, N, K)` each.
    """
    largest: list[float] = []
    for start in (0, 1):
        own, other = images[:, start::2], curved[:, start::2]
        gram = own.flatten(1) @ other.flatten(1).T * (images.shape[1] / own.shape[1])
        largest.append(torch.linalg.eigvalsh(gram.double().cpu())[-1].item())
    return sum(largest) / 2


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return unit


def _summed(grams: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(grams.values())).sum(0)


def _alignment(product: Tensor, target_square: Tensor, moments: KernelMoments) -> Estimate:
    """Computes the alignment from its numerator and the estimated norm of the kernel."""
    value, low, high = interval(moments.square, moments.known_square)
    # The alignment is smallest where the kernel is largest.
    norms = target_square * torch.tensor([value, high, low], dtype=product.dtype).sqrt()
    return Estimate(*torch.nan_to_num(product / norms).tolist())


def _flat(pulled: Tensors, index: int) -> Tensor:
    return torch.cat([value[index].flatten() for value in pulled.values()])


def _by_name(vector: Tensor, shapes: Mapping[str, torch.Size]) -> Tensors:
    parts = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
