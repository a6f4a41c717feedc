"""Four gradients of a univariate Gaussian policy whose Fisher matrix is known: vanilla, exact natural, empirical, RAT.

Run: python rat_gaussian.py --out gaussian.png    Equation numbers: README.md, "How it works".

The policy is N(mu, sigma^2) with theta = (mu, log sigma). The return is r(a) = -(a - optimum)^2 / 2 plus the policy's
entropy times `entropy`, which puts the best theta at mu = optimum, sigma^2 = entropy:

    J = -((mu - optimum)^2 + sigma^2) / 2 + entropy * log sigma + constant
    gradient of J = (optimum - mu, entropy - sigma^2),    F = diag(1 / sigma^2, 2)

Vanilla and exact natural gradients are these closed forms, without damping. The other two see B sampled actions and
noisy returns: the empirical natural gradient solves the p x p system of equation (1), RAT the B x B system of (2). With
the same damping these are one direction by the identity (1), so what keeps both off the exact natural gradient is
sampling and damping: try --damping 100, which turns them into the vanilla gradient of the samples.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import cosine_similarity, normalize


@dataclass
class Args:
    optimum: float = 0.0  # best mean
    entropy: float = 0.25  # weight of the entropy, > 0: the best variance
    noise: float = 1.0  # standard deviation of what a return has on top of r(a), >= 0
    samples: int = 256  # B, actions sampled at each theta
    damping: float = 0.1  # lambda of equation (1), > 0
    points: int = 12  # of the grid of theta along each axis; even, for the optimum in its middle has no direction
    seed: int = 1  # of the samples
    out: Path | None = None  # picture to write


def vanilla_gradient(args: Args, mu: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of J [2]."""
    return torch.stack([args.optimum - mu, args.entropy - sigma**2])


def exact_natural_gradient(args: Args, mu: Tensor, sigma: Tensor) -> Tensor:
    """F^-1 times the gradient of J [2]."""
    return vanilla_gradient(args, mu, sigma) * torch.stack([sigma**2, torch.full_like(sigma, 0.5)])


def sampled_scores(args: Args, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """H [B, 2], the rows d log pi(a_i) / d theta of B sampled actions, and their centred advantages y [B]."""
    noise = torch.randn(args.samples, dtype=mu.dtype)
    actions = mu + sigma * noise
    scores = torch.stack([noise / sigma, noise**2 - 1], 1)  # [B, 2]
    y = -((actions - args.optimum) ** 2) / 2 - args.entropy * Normal(mu, sigma).log_prob(actions)
    y += args.noise * torch.randn_like(y)
    return scores, y - y.mean()


def empirical_natural_gradient(scores: Tensor, y: Tensor, damping: float) -> Tensor:
    """(lambda I_p + H^T Sigma H)^-1 H^T Sigma y [p] with Sigma = I / B, the left side of equation (1)."""
    fisher = scores.T @ scores / len(y)  # [p, p]
    return torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=y.dtype), scores.T @ y / len(y))


def rat_gradient(scores: Tensor, y: Tensor, damping: float) -> Tensor:
    """H^T Sigma A [p] with the transformed advantages A [B] of equation (2), the right side of (1)."""
    root = torch.full_like(y, len(y) ** -0.5)  # S, the root of Sigma
    system = root[:, None] * (scores @ scores.T) * root + damping * torch.eye(len(y), dtype=y.dtype)  # M [B, B]
    solved = torch.cholesky_solve((root * y)[:, None], torch.linalg.cholesky(system))[:, 0]
    return scores.T @ (root * solved)


def fields(args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Grid of theta [points^2, 2] around the optimum and each gradient there [points^2, 2], in float64."""
    torch.manual_seed(args.seed)
    line = torch.linspace(-1, 1, args.points, dtype=torch.float64)
    grid = torch.cartesian_prod(args.optimum + 2 * line, math.log(args.entropy) / 2 + 1.5 * line)
    found = {"vanilla": [], "exact natural": [], "empirical natural": [], "RAT": []}
    for mu, log_sigma in grid:
        sigma = log_sigma.exp()
        scores, y = sampled_scores(args, mu, sigma)
        found["vanilla"].append(vanilla_gradient(args, mu, sigma))
        found["exact natural"].append(exact_natural_gradient(args, mu, sigma))
        found["empirical natural"].append(empirical_natural_gradient(scores, y, args.damping))
        found["RAT"].append(rat_gradient(scores, y, args.damping))
    return grid, {name: torch.stack(gradients) for name, gradients in found.items()}


def draw(args: Args, grid: Tensor, gradients: dict[str, Tensor], similarity: dict[str, Tensor]) -> None:
    """One panel a gradient: unit arrows, coloured by cosine similarity to the exact one, over the contours of J."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.1), sharey=True, layout="constrained")
    mu, log_sigma = grid.T.reshape(2, args.points, args.points)
    objective = args.entropy * log_sigma - ((mu - args.optimum) ** 2 + (2 * log_sigma).exp()) / 2
    for axis, (name, gradient) in zip(axes, gradients.items(), strict=True):
        axis.contour(mu, log_sigma, objective, levels=12, colors="0.8", linewidths=0.7, linestyles="solid", zorder=0)
        look = {"angles": "xy", "scale": 16, "width": 0.008, "cmap": "viridis_r", "clim": (0, 1)}
        arrows = axis.quiver(*grid.T, *normalize(gradient).T, similarity[name], **look)
        axis.plot(args.optimum, math.log(args.entropy) / 2, "*", color="#d55e00", markersize=12)
        axis.set(title=f"{name}\nmean cosine {similarity[name].mean():.3f}", xlabel="μ")
    axes[0].set_ylabel(r"log $\sigma$")
    figure.colorbar(arrows, ax=axes, label="cosine to exact natural")
    figure.suptitle(f"B = {args.samples} samples, damping λ = {args.damping:g}, star: optimum", fontsize=10)
    figure.savefig(args.out, dpi=110)


def fail(sentence: str) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"rat_gaussian: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def main(args: Args) -> None:
    """Print the similarities, draw the fields."""
    for name, least in {"optimum": -(2**31), "noise": 0, "samples": 2, "seed": 0, "points": 2}.items():
        if not least <= getattr(args, name) < 2**31:
            fail(f"--{name} {getattr(args, name)} must lie in [{least}, 2**31).")
    for name in ("entropy", "damping"):
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name} {getattr(args, name)} must be positive and finite.")
    if args.points % 2:
        fail(f"--points {args.points} must be even, for the optimum in the middle has no direction.")
    grid, gradients = fields(args)
    exact, empirical = gradients["exact natural"], gradients["empirical natural"]
    similarity = {name: cosine_similarity(gradient, exact) for name, gradient in gradients.items()}
    print(f"B = {args.samples}, damping {args.damping:g}, {len(grid)} policies around the optimum\n")
    print("| cosine similarity | to exact natural: mean | lowest | to empirical natural: mean | lowest |")
    print("|---|---|---|---|---|")
    for name, gradient in gradients.items():
        to_empirical = cosine_similarity(gradient, empirical)
        cells = [x for values in (similarity[name], to_empirical) for x in (values.mean(), values.min())]
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in cells) + " |")
    if args.out:
        try:
            draw(args, grid, gradients, similarity)
        except (OSError, ValueError) as error:  # no such folder, no such format
            fail(f"--out {args.out} cannot be written ({error}), name a picture in a folder that exists.")


if __name__ == "__main__":
    main(tyro.cli(Args))
