"""Environments that a test needs and Gymnasium has not: `--env-id toy_envs:NAME-v0` with this folder on the path."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict


class Toy(gym.Env):
    """Short episodes of random observations, rewarded for small actions; rewards and spaces vary by keyword."""

    def __init__(self, observation=None, action=None, bad_step=None, bad_value=np.nan, bad_reward=True, length=10):
        self.observation_space = observation or Box(-1, 1, (3,))
        self.action_space = action or Box(-2, 2, (1,))
        self.bad_step, self.bad_value, self.bad_reward = bad_step, bad_value, bad_reward
        self.steps, self.length = 0, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.time, self.steps = self.time + 1, self.steps + 1
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        reward = -float(np.square(action).sum())
        if self.steps == self.bad_step:
            if self.bad_reward:
                reward = self.bad_value
            else:
                obs[1] = self.bad_value
        return obs, reward, self.time == self.length, False, {}


KINDS = {
    "UnboundedActions": {"action": Box(-np.inf, np.inf, (1,))},
    "DictObs": {"observation": Dict({"a": Box(-1, 1, (3,))})},
    "ImageObs": {"observation": Box(0, 255, (8, 8, 3), np.uint8)},
    "OneStep": {"length": 1},
    "NanReward": {"bad_step": 40},
    "NanObs": {"bad_step": 40, "bad_reward": False},
    "HugeReward": {"bad_step": 40, "bad_value": 3e38},
}
for name, kwargs in KINDS.items():
    gym.register(f"{name}-v0", entry_point=Toy, kwargs=kwargs, disable_env_checker=True)
