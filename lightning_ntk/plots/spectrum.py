"""The kernel's eigenvalues, and the share of the residual along each mode."""

from typing import Any

import torch
from torch import Tensor

from lightning_ntk.plots.style import GREY, LINEARIZED, TRAINED, Drawing, new_figure, tidy
from lightning_ntk.utilities.shapes import Float


def plot_spectrum(
    eigenvalues: Float[Tensor, "m"],
    residual: Float[Tensor, "m"],
    *,
    time: float | None = None,
    title: str | None = None,
) -> Drawing:
    r"""Draws the eigenvalues of the kernel and the residual's energy in each mode.

    Modes with large eigenvalues are learned first: by kernel time :math:`\eta t`, those with :math:`\lambda > 1 / (\eta t)`.

    Args:
        eigenvalues: :math:`\lambda`, `(m,)` in any order.
        residual: Coefficients of the initial residual f0 - Y along the modes, `(m,)` in the same order.
        time: The kernel time :math:`\eta t` (learning rate times factor of the loss times steps) at which to shade the modes
            already learned. Default: no shading.
        title: Title of the figure.

    Returns:
        The figure and its two axes over the rank of the mode. Above are the eigenvalues; below, shares of the energy (points)
        and their cumulative sum (line).

    Raises:
        ValueError: If the two are not vectors of one length, the residual is zero, or no eigenvalue is positive.
    """
    if eigenvalues.dim() != 1 or eigenvalues.shape != residual.shape or len(eigenvalues) == 0:
        raise ValueError(
            f"Expected eigenvalues and residual coefficients of one shape (m,) but got {tuple(eigenvalues.shape)} "
            f"and {tuple(residual.shape)}."
        )
    eigenvalues, order = eigenvalues.detach().cpu().double().sort(descending=True)
    energy = residual.detach().cpu().double()[order].square()
    if not (eigenvalues[0] > 0 and energy.sum() > 0):
        raise ValueError("Expected a positive eigenvalue and a residual that is not zero: there is nothing to learn.")
    shares = energy / energy.sum()
    ranks = torch.arange(1, len(eigenvalues) + 1)
    figure = new_figure(6.2, 5.6)
    spectrum, energies = figure.subplots(2, 1, sharex=True)
    positive = eigenvalues > 0
    spectrum.plot(ranks[positive], eigenvalues[positive], "o", color=TRAINED, markersize=3, rasterized=True)
    spectrum.set_yscale("log")
    spectrum.set_ylabel(r"eigenvalue $\lambda$ of the kernel")
    _keep_decades(spectrum, eigenvalues[0].item(), decades=12)
    energies.plot(ranks, shares, "o", color=TRAINED, markersize=3, alpha=0.7, rasterized=True, label="one mode")
    energies.plot(ranks, shares.cumsum(0), "-", color=LINEARIZED, linewidth=2, label="cumulative")
    energies.set_yscale("log")
    energies.set_ylabel("share of the residual's energy")
    energies.set_xlabel("rank of the mode, by eigenvalue")
    _keep_decades(energies, 1.0, decades=8)
    if len(ranks) > 20:
        energies.set_xscale("log")
    title = title or "Spectrum of the kernel, and where the residual lies"
    if time is not None:
        learned = int((eigenvalues * time > 1).sum())
        title += f"\nshaded: {learned} of {len(ranks)} modes learned, $\\lambda > 1/(\\eta t)$, "
        title += f"with {shares[:learned].sum().item():.1%} of the energy"
        for axis in (spectrum, energies):
            axis.axvspan(0.8, learned + 0.5, color=GREY, alpha=0.18, linewidth=0)
    spectrum.set_title(title, fontsize=10)
    energies.legend(frameon=False, loc="lower left")
    for axis in (spectrum, energies):
        tidy(axis)
    return Drawing(figure, (spectrum, energies))


def _keep_decades(axis: Any, largest: float, decades: int) -> None:
    """Leaves out what is too far below the largest value, which is rounding."""
    axis.set_ylim(bottom=max(axis.get_ylim()[0], largest * 10.0**-decades), top=largest * 3)
