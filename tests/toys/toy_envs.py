"""Environments that a test needs and Gymnasium has not: `--env-id toy_envs:NAME-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict


class Toy(gym.Env):
    """Short episodes of random observations, rewarded for small actions.

    In step bad_step of its life an environment returns bad_value, as reward or in the observation,
    or raises it where it is an exception."""

    def __init__(
        self,
        observation=None,
        action=None,
        bad_step=None,
        bad_value=np.nan,
        bad_reward=True,
        length=10,
    ):
        self.observation_space = observation or Box(-1, 1, (3,))
        self.action_space = action or Box(-2, 2, (1,))
        self.bad_step, self.bad_value, self.bad_reward = bad_step, bad_value, bad_reward
        self.steps, self.length = 0, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time, self.steps = self.time + 1, self.steps + 1
        obs = self.observe()
        reward = -float(np.square(action).sum())
        if self.steps == self.bad_step and isinstance(self.bad_value, Exception):
            raise self.bad_value
        if self.steps == self.bad_step and self.bad_reward:
            reward = self.bad_value
        return obs, reward, self.time == self.length, False, {}

    def observe(self):
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        if self.steps == self.bad_step and not self.bad_reward:
            obs[1] = self.bad_value
        return obs


class Follow(gym.Env):
    """Rewarded for an action near the observation, which has an offset in float64."""

    def __init__(self, offset=0.0):
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = Box(-1, 1, (1,))
        self.offset = offset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        reward = -float((action[0] - self.target) ** 2)
        return self.observe(), reward, self.time == 20, False, {}

    def observe(self):
        self.target = self.np_random.uniform(-1, 1)
        return np.array([self.offset + 10 * self.target])


class Constant(Toy):
    """A task without state: every observation is the same."""

    def observe(self):
        return np.zeros(3, np.float32)


KINDS = {
    "UnboundedActions": {"action": Box(-np.inf, np.inf, (1,))},
    "HugeActions": {"action": Box(-1e300, 1e300, (1,), np.float64)},
    "WideActions": {"action": Box(-3e38, 3e38, (1,))},
    "IntegerActions": {"action": Box(0, 10, (1,), np.int64)},
    "DictObs": {"observation": Dict({"a": Box(-1, 1, (3,))})},
    "ImageObs": {"observation": Box(0, 255, (8, 8, 3), np.uint8)},
    "OneStep": {"length": 1},
    "NanReward": {"bad_step": 40},
    "NanObs": {"bad_step": 40, "bad_reward": False},
    "NanFirst": {"bad_step": 0, "bad_reward": False},
    "HugeReward": {"bad_step": 40, "bad_value": 3e38},
    "Boom": {"bad_step": 40, "bad_value": ValueError("simulator exploded")},
    "BadConstructor": {"wrong_keyword": 1},
}
for name, kwargs in KINDS.items():
    gym.register(f"{name}-v0", entry_point=Toy, kwargs=kwargs, disable_env_checker=True)
for name, offset in {"Near": 0.0, "Far": 1.7e9}.items():
    gym.register(f"{name}-v0", entry_point=Follow, kwargs={"offset": offset})
gym.register("Constant-v0", entry_point=Constant, disable_env_checker=True)
