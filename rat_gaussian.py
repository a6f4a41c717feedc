# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==1.26.4",
#     "tyro==1.0.17",
#     "matplotlib==3.11.2",
# ]
# ///
"""RAT where the Fisher matrix is known: four gradients of a Gaussian policy of one action.

Run: python rat_gaussian.py --out gaussian.png. Equation numbers: docs/algorithm.md.

The policy is N(mu, sigma^2), theta = (mu, log sigma). The return is r(a) = -(a - optimum)^2 / 2
and the policy's entropy is worth `entropy`: the best theta is mu = optimum, sigma^2 = entropy.

    J = -((mu - optimum)^2 + sigma^2) / 2 + entropy log sigma + constant
    gradient of J = (optimum - mu, entropy - sigma^2)       vanilla_gradient
    F = diag(1 / sigma^2, 2), F^-1 gradient of J            exact_natural_gradient
    H and y of B sampled actions and noisy returns          sampled_scores
    left side of (1), a system of size p = 2                empirical_natural_gradient
    right side of (1), a system of size B                   rat_gradient

The last two are one direction. What keeps it off the exact natural gradient is sampling and
damping: --damping 100 turns it into the vanilla gradient of the samples.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from PIL import Image
from torch.distributions import Normal
from torch.nn.functional import cosine_similarity, normalize


@dataclass
class Args:
    optimum: float = 0.0  # best mean
    entropy: float = 0.25  # weight of the entropy, > 0: the best variance
    noise: float = 1.0  # standard deviation of what a return has on top of r(a), >= 0
    samples: int = 256  # B, actions sampled at each theta
    damping: float = 0.1  # lambda of equation (1), > 0
    points: int = 12  # of the grid of theta along each axis, even: the optimum has no direction
    seed: int = 1  # of the samples
    out: Path | None = None  # picture to write

    def __post_init__(self):
        check_args(self)


def check_args(args):
    """Raise ValueError for a value that cannot work; tyro prints the sentence, exit code 2."""
    least = {"optimum": -(2**31), "noise": 0, "samples": 2, "seed": 0, "points": 2}
    for name, low in least.items():
        value = getattr(args, name)
        if not low <= value < 2**31:
            raise ValueError(f"--{name} {value} must lie in [{low}, 2^31).")
    for name in ("entropy", "damping"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be positive and finite.")
    if args.points % 2:
        raise ValueError(f"--points {args.points} must be even: the optimum has no direction.")


# ---- The four gradients ----------------------------------------------------------------------


def vanilla_gradient(args, mu, sigma):
    """Gradient of J, [2]."""
    return torch.stack([args.optimum - mu, args.entropy - sigma**2])


def exact_natural_gradient(args, mu, sigma):
    """F^-1 times the gradient of J, [2]."""
    inverse_fisher = torch.stack([sigma**2, torch.full_like(sigma, 0.5)])  # its diagonal
    return inverse_fisher * vanilla_gradient(args, mu, sigma)


def sampled_scores(args, mu, sigma):
    """H [B, 2], whose rows are d log pi(a_i) / d theta, and the centred advantages y [B]."""
    noise = torch.randn(args.samples, dtype=mu.dtype)
    actions = mu + sigma * noise
    scores = torch.stack([noise / sigma, noise**2 - 1], 1)  # [B, 2]
    rewards = -((actions - args.optimum) ** 2) / 2
    returns = rewards - args.entropy * Normal(mu, sigma).log_prob(actions)
    returns += args.noise * torch.randn_like(returns)
    return scores, returns - returns.mean()


def empirical_natural_gradient(scores, y, damping):
    """(lambda I + H^T Sigma H)^-1 H^T Sigma y, [p], with Sigma = I / B: the left side of (1)."""
    fisher = scores.T @ scores / len(y)  # [p, p]
    fisher.diagonal().add_(damping)
    return torch.linalg.solve(fisher, scores.T @ y / len(y))


def rat_gradient(scores, y, damping):
    """H^T Sigma A, [p], with the transformed advantages A of (2): the right side of (1)."""
    sqrt_sigma = len(y) ** -0.5  # S
    damped_kernel = sqrt_sigma * (scores @ scores.T) * sqrt_sigma  # S H H^T S, [B, B]
    damped_kernel.diagonal().add_(damping)
    factor = torch.linalg.cholesky(damped_kernel)
    solution = torch.cholesky_solve((sqrt_sigma * y)[:, None], factor)[:, 0]  # [B]
    return scores.T @ (sqrt_sigma * solution)


# ---- Fields ----------------------------------------------------------------------------------


def fields(args):
    """Thetas on a grid around the optimum and each gradient there, [points^2, 2] in float64."""
    torch.manual_seed(args.seed)
    line = torch.linspace(-1, 1, args.points, dtype=torch.float64)
    best_log_sigma = math.log(args.entropy) / 2
    grid = torch.cartesian_prod(args.optimum + 2 * line, best_log_sigma + 1.5 * line)
    found = {"vanilla": [], "exact natural": [], "empirical natural": [], "RAT": []}
    for mu, log_sigma in grid:
        sigma = log_sigma.exp()
        scores, y = sampled_scores(args, mu, sigma)
        found["vanilla"].append(vanilla_gradient(args, mu, sigma))
        found["exact natural"].append(exact_natural_gradient(args, mu, sigma))
        found["empirical natural"].append(empirical_natural_gradient(scores, y, args.damping))
        found["RAT"].append(rat_gradient(scores, y, args.damping))
    return grid, {name: torch.stack(gradients) for name, gradients in found.items()}


def cosines(gradients, other):
    """Cosine similarity of each gradient to the other, [points^2]."""
    return {name: cosine_similarity(g, gradients[other]) for name, g in gradients.items()}


def draw(args, grid, gradients, cosine):
    """A panel a gradient: unit arrows, coloured by cosine to the exact one, over J's contours."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.1), sharey=True, layout="constrained")
    mu, log_sigma = grid.T.reshape(2, args.points, args.points)
    spread = (mu - args.optimum) ** 2 + (2 * log_sigma).exp()
    objective = args.entropy * log_sigma - spread / 2  # J
    lines = {"colors": "0.8", "linewidths": 0.7, "linestyles": "solid", "zorder": 0}
    look = {"angles": "xy", "scale": 16, "width": 0.008, "cmap": "viridis_r", "clim": (0, 1)}
    for axis, (name, gradient) in zip(axes, gradients.items()):
        axis.contour(mu, log_sigma, objective, levels=12, **lines)
        arrows = axis.quiver(*grid.T, *normalize(gradient).T, cosine[name], **look)
        axis.plot(args.optimum, math.log(args.entropy) / 2, "*", color="#d55e00", markersize=12)
        axis.set_title(f"{name}\nmean cosine {cosine[name].mean():.3f}")
        axis.set_xlabel("μ")
    axes[0].set_ylabel(r"log $\sigma$")
    figure.colorbar(arrows, ax=axes, label="cosine to exact natural")
    title = f"B = {args.samples} samples, damping λ = {args.damping:g}, star: optimum"
    figure.suptitle(title, fontsize=10)
    save(figure, args.out)


def save(figure, path):
    """Write a picture; with a palette a PNG takes a third of the bytes."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    if path.suffix == ".png":
        picture = Image.open(path).convert("RGB")
        palette = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
        picture.quantize(**palette).save(path, optimize=True)


def main(args: Args):
    """Print the cosine similarities, draw the fields."""
    grid, gradients = fields(args)
    to_exact = cosines(gradients, "exact natural")
    to_empirical = cosines(gradients, "empirical natural")
    print(f"B = {args.samples}, damping {args.damping:g}, {len(grid)} policies\n")
    print("| cosine to | exact natural: mean | lowest | empirical natural: mean | lowest |")
    print("|---|---|---|---|---|")
    for name in gradients:
        cells = []
        for cosine in (to_exact[name], to_empirical[name]):
            cells += [f"{cosine.mean():.4f}", f"{cosine.min():.4f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.out:
        try:
            draw(args, grid, gradients, to_exact)
        except (OSError, ValueError) as error:  # no such folder, no such format
            sentence = f"--out {args.out} cannot be written ({error})"
            hint = "name a .png in a folder that exists"
            print(f"rat_gaussian: {sentence}: {hint}.", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main(tyro.cli(Args))
