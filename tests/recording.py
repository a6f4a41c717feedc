"""What a real run hands to its core and its critic, and the same recomputed in NumPy.

A run of two iterations on InvertedPendulum-v5, where a random policy falls every few steps, so
that many steps only reset. Everything is recomputed from the raw rollout: which steps are data,
advantages, returns, the running statistics, PopArt's units and the KL divergence."""

import copy
import importlib
from dataclasses import dataclass, field

import numpy as np
import torch
from conftest import read_csv, train

GAMMA, LAMBDA, BETA = 0.99, 0.95, 0.99999
SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 8, "--num-steps", 32, "--device", "cpu"]
ITERATIONS = 2


@dataclass
class Iteration:
    """What was recorded in one iteration; tensors are copies."""

    agent: torch.nn.Module  # as it stepped the environments
    rollout: tuple
    policy: torch.nn.Module = None  # the agent before the core's first update
    core: list = field(default_factory=list)  # (arguments, the agent then) of each call
    critic: tuple = None  # the samples that the critic is handed
    clips: list = field(default_factory=list)  # bounds on gradient norms
    trained: torch.nn.Module = None  # the agent after all updates
    row: dict = None  # of progress.csv


def record(script, core, folder, monkeypatch, *arguments):
    """Train two iterations; an Iteration each. core: the function that every block is handed to."""
    module = importlib.import_module(script)
    iterations = []
    agents = []

    def wrap(name, before):
        original = getattr(module, name)

        def recorded(*arguments, **named):
            before(*arguments)
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, recorded)

    collect = module.collect

    def recorded_collect(envs, agent, *arguments):
        if iterations:
            iterations[-1].trained = copy.deepcopy(agent)
        agents[:] = [agent]
        before = copy.deepcopy(agent)
        rollout = collect(envs, agent, *arguments)
        iterations.append(Iteration(before, rollout._replace(obs=rollout.obs.clone())))
        return rollout

    def before_core(*arguments):
        now = copy.deepcopy(agents[0])
        if iterations[-1].policy is None:
            iterations[-1].policy = now
        iterations[-1].core.append((copy.deepcopy(arguments[1:]), now))

    def before_critic(args, critic, optimizer, samples):
        iterations[-1].critic = copy.deepcopy(samples)

    clip = torch.nn.utils.clip_grad_norm_

    def recorded_clip(parameters, bound, *more):
        iterations[-1].clips.append(bound)
        return clip(parameters, bound, *more)

    monkeypatch.setattr(module, "collect", recorded_collect)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
    wrap(core, before_core)
    if hasattr(module, "fit_critic"):
        wrap("fit_critic", before_critic)
    steps = ITERATIONS * 8 * 32
    where = ["--total-timesteps", steps, "--output-dir", folder, "--run-name", "recorded"]
    train(script, *SMALL, *where, *arguments)
    iterations[-1].trained = agents[0]
    for iteration, row in zip(iterations, read_csv(folder / "recorded"), strict=True):
        iteration.row = {name: float(value) for name, value in row.items()}
    return iterations


@dataclass
class Expected:
    """The samples of an iteration, recomputed: an array each, in the order of the rollout."""

    obs: np.ndarray
    actions: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    std: float  # PopArt's, after its update

    def rows(self, actions):
        """Which samples a block holds; none twice."""
        places = {action.tobytes(): row for row, action in enumerate(self.actions)}
        rows = [places[action.tobytes()] for action in np.ascontiguousarray(actions)]
        assert len(set(rows)) == len(rows)
        return rows


def values_of(agent, obs):
    """Values in units of reward: the critic at normalised obs, mean + std * its output."""
    normalizer = agent.normalizer
    std = (normalizer.var + 1 / (normalizer.count + 1) + 1e-5).sqrt()
    scaled = (obs.double() - normalizer.mean) / std
    scaled = scaled.clamp(-5, 5).float()
    with torch.no_grad():
        if hasattr(agent, "critic"):
            output = agent.critic(scaled)
        else:
            output = agent.popart(agent.trunk(scaled))
    return (agent.popart.mean + agent.popart.std * output.double()).numpy()


def advantages_of(rollout, values):
    """Generalised advantage estimation, one environment and one step after the other."""
    rewards, terminated, done = (rollout[i].double().numpy() for i in (2, 3, 4))
    result = np.zeros_like(rewards)
    for env in range(rewards.shape[1]):
        trace = 0.0
        for t in reversed(range(len(rewards))):
            bootstrap = 0.0 if terminated[t, env] else GAMMA * values[t + 1, env]
            delta = rewards[t, env] + bootstrap - values[t, env]
            trace = delta if done[t, env] else delta + GAMMA * LAMBDA * trace
            result[t, env] = trace
    return result


def recompute(iterations):
    """An Expected for each recorded iteration."""
    seen = []  # raw observations of all samples so far
    moments = np.zeros(3)
    last_done = np.zeros(8, dtype=bool)
    found = []
    for iteration in iterations:
        rollout = iteration.rollout
        values = values_of(iteration.agent, rollout.obs)
        done = rollout.done.numpy() > 0
        keep = ~np.concatenate([last_done[None], done[:-1]])
        last_done = done[-1]
        advantages = advantages_of(rollout, values)
        returns = (advantages + values[:-1])[keep]
        obs = rollout.obs[:-1].double().numpy()[keep]
        seen.append(obs)
        everything = np.concatenate(seen)
        scale = np.sqrt(everything.var(0) + 1 / (len(everything) + 1) + 1e-5)
        normalised = np.clip((obs - everything.mean(0)) / scale, -5, 5)
        powers = np.array([1.0, returns.mean(), (returns**2).mean()])
        moments = BETA * moments + (1 - BETA) * powers
        mean, square = moments[1:] / moments[0]
        std = np.sqrt(max(square - mean**2, 1e-6))
        actions = rollout.actions.numpy()[keep]
        found.append(Expected(normalised, actions, advantages[keep], (returns - mean) / std, std))
        assert 0 < (~keep).sum() < keep.size / 4
    return found


def log_prob(agent, obs, actions):
    """log pi(a|s) of a diagonal Gaussian, by its formula."""
    mean, std = gaussian(agent, obs)
    z = (actions - mean) / std
    return (-(z**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2).sum(1)


def gaussian(agent, obs):
    """Mean and standard deviation [n, act_dim] of the policy at normalised observations."""
    with torch.no_grad():
        policy = agent.policy(torch.as_tensor(obs, dtype=torch.float32)).base_dist
    return policy.loc.double().numpy(), policy.scale.double().numpy()


def kl_divergence(old, new, obs):
    """Mean KL(old || new) of two agents' Gaussians."""
    mean, std = gaussian(old, obs)
    new_mean, new_std = gaussian(new, obs)
    terms = np.log(new_std / std) + (std**2 + (mean - new_mean) ** 2) / (2 * new_std**2) - 0.5
    return terms.sum(1).mean()


def check_statistics(iterations, expected):
    """Running statistics and the metrics of every iteration."""
    count = 0
    for iteration, wanted in zip(iterations, expected, strict=True):
        count += len(wanted.obs)
        assert iteration.policy.normalizer.count.item() == count
        np.testing.assert_allclose(iteration.policy.popart.std.item(), wanted.std, rtol=1e-4)
        row = iteration.row
        variance = (wanted.returns * wanted.std).var(ddof=1)
        explained = 1 - wanted.advantages.var(ddof=1) / variance
        np.testing.assert_allclose(row["explained_variance"], explained, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(row["advantage_rms"], wanted.advantages.std(ddof=1), rtol=1e-3)
        kl = kl_divergence(iteration.policy, iteration.trained, wanted.obs)
        np.testing.assert_allclose(row["kl"], kl, rtol=2e-2, atol=1e-6)
        _, std = gaussian(iteration.trained, wanted.obs)
        entropy = (np.log(std) + np.log(2 * np.pi * np.e) / 2).sum(1).mean()
        np.testing.assert_allclose(row["entropy"], entropy, rtol=1e-4)


def check_critic(iterations, expected, bound=5.0):
    """The critic is handed the samples alone, in PopArt's units, and its gradients are clipped."""
    for iteration, wanted in zip(iterations, expected, strict=True):
        samples = iteration.critic
        np.testing.assert_allclose(samples.obs, wanted.obs, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(samples.returns, wanted.returns, rtol=1e-3, atol=1e-4)
        assert bound in iteration.clips


def check_block(wanted, policy, obs, actions, y, ratio, agent, limits=(0.1, 10.0)):
    """One block's data: normalised observations, centred advantages, clamped ratios."""
    rows = wanted.rows(actions.numpy())
    np.testing.assert_allclose(obs, wanted.obs[rows], rtol=1e-3, atol=1e-4)
    advantages = wanted.advantages[rows]
    scaled = (advantages - advantages.mean()) / advantages.std()
    np.testing.assert_allclose(y, scaled, rtol=1e-3, atol=1e-3)
    before, now = (log_prob(a, wanted.obs[rows], wanted.actions[rows]) for a in (policy, agent))
    np.testing.assert_allclose(ratio, np.clip(np.exp(now - before), *limits), rtol=2e-3, atol=1e-3)
    return rows
