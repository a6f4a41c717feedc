"""Play a checkpoint of any script here: mean return and length, optionally as JSON or as a video.

Run: python enjoy.py runs/RUN_NAME/checkpoint.pt --episodes 10 --video out.mp4
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint.pt of a run
    episodes: int = 10  # episodes to play
    stochastic: bool = False  # sample actions; the default plays the policy's mean (or its most likely action)
    video: Path | None = None  # record all episodes to this .mp4: a frame at each reset and after each step
    json: bool = False  # print one JSON object instead, with every episode's return and length
    seed: int = 1  # of sampling and the environment


# Checkpoint, environment, agent
def fail(sentence: str) -> NoReturn:
    """End the program with one sentence on stderr. Exit code 2: bad input."""
    print(f"enjoy: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU; refuse one that is missing, damaged, or not from a script next to this file."""
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        name, *_ = state["algorithm"], state["agent"], state["global_step"], state["args"]["env_id"] + ""
        known = name.isidentifier() and Path(__file__).with_name(f"{name}.py").is_file()  # it will be imported
    except Exception as error:  # weights_only meets damage with anything from EOFError to UnpicklingError
        fail(f"{path} is {'no checkpoint or damaged' if path.exists() else 'missing'} ({type(error).__name__}).")
    return state if known else fail(f"{path} is from {name!r}, there is no such script next to enjoy.py.")


class ProcgenGame(gym.Env):
    """One Procgen game on the levels that the checkpoint was trained on, as Gymnasium's environments play.

    Procgen starts the next episode within the step that ends one, so that the last frame shown is already the next
    episode's first, and reset only says where that begins."""

    metadata = {"render_fps": 15}  # noqa: RUF012

    def __init__(self, module: ModuleType, args: dict, render: bool):
        known = {field.name for field in fields(module.Args)}
        self.args = module.Args(**{name: value for name, value in args.items() if name in known} | {"num_envs": 1})
        self.make, self.games = partial(module.Procgen, render_mode="rgb_array" if render else None), None
        self.observation_space = module.Procgen.single_observation_space
        self.action_space = module.Procgen.single_action_space
        self.spec = gym.envs.registration.EnvSpec(args["env_id"])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if self.games is None or seed is not None:
            self.games = self.make(self.args, seed or 0)
        return self.games.env.observe()[1]["rgb"][0], {}

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.games.step(action[None])
        return obs[0], reward[0], terminated[0], truncated[0], info

    def render(self) -> np.ndarray:
        return self.games.env.get_info()[0]["rgb"]


def make_env(state: dict, render: bool) -> gym.Env:
    """One environment, with a trial of its rendering; refuse one that cannot be made or rendered."""
    env_id = state["args"]["env_id"]
    if hasattr(module := importlib.import_module(state["algorithm"]), "Procgen"):
        return ProcgenGame(module, state["args"], render)
    gym.logger.min_level = gym.logger.ERROR  # "v4 is out of date" was the training run's choice
    if render and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported, by gym.make
    try:
        env = gym.make(env_id, render_mode="rgb_array" if render else None)
        if render:
            env.reset(seed=0)
            env.render()
    except Exception as error:  # OpenGL without its library raises anything from AttributeError to FatalError
        if not render or isinstance(error, (gym.error.UnregisteredEnv, ModuleNotFoundError)):
            fail(f"{env_id} cannot be made: {error}")
        sys.unraisablehook = lambda _: None  # Gymnasium's half-made viewer raises once more when it is freed
        fail(f"{env_id} cannot be rendered ({error}): without a display MuJoCo needs EGL, Debian's libegl1.")
    return env


def load_agent(state: dict, env: gym.Env) -> nn.Module:
    """The Agent of the script that wrote the checkpoint."""
    module = importlib.import_module(state["algorithm"])
    try:
        networks = {name: state["args"][name] for name in ("shared", "channels", "hidden") if name in state["args"]}
        agent = module.Agent(env.observation_space, env.action_space, **networks)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # other spaces, other sizes, no Agent
        fail(f"the checkpoint does not fit {module.__name__}.py on {env.spec.id} ({type(error).__name__}).")
    return agent


# Playing
@contextmanager
def recorder(env: gym.Env, path: Path) -> Iterator[Callable[[], None]]:
    """Function that appends the frame env shows now to the video; path appears when that is complete."""

    def record() -> None:
        nonlocal frames
        height, width, _ = (frame := env.render()).shape
        writer.append_data(frame[: height // 2 * 2, : width // 2 * 2])  # yuv420p takes even sizes
        frames += 1

    frames, partial, fps = 0, path.with_suffix(".partial.mp4"), env.metadata.get("render_fps") or 30
    options = {"format": "FFMPEG", "fps": fps, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
    try:
        import imageio.v2 as imageio
        from imageio_ffmpeg import count_frames_and_secs

        partial.touch()
        with imageio.get_writer(partial, **options) as writer:
            yield record
        with suppress(RuntimeError):  # FFmpeg reads what it wrote: imageio does not tell that the disk was full
            if count_frames_and_secs(str(partial))[0] == frames:
                partial.replace(path)
                return
        fail(f"--video {path} cannot be written: FFmpeg left it incomplete.")
    except ImportError:
        fail("--video needs imageio and FFmpeg: pip install imageio imageio-ffmpeg.")
    except OSError as error:
        fail(f"--video {path} cannot be written: {error.strerror or 'FFmpeg failed'}.")
    finally:
        with suppress(OSError):
            partial.unlink()


def play(agent: nn.Module, env: gym.Env, args: Args, record: Callable[[], None]) -> tuple[list[float], list[int]]:
    """Returns and lengths of args.episodes episodes."""
    returns, lengths = [0.0] * args.episodes, [0] * args.episodes
    torch.manual_seed(args.seed)
    for i in range(args.episodes):
        obs, done = env.reset(seed=args.seed if i == 0 else None)[0], False
        record()
        while not done:
            _, env_action = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None], not args.stochastic)
            obs, reward, terminated, truncated, _ = env.step(env_action.numpy()[0])
            returns[i], lengths[i], done = returns[i] + float(reward), lengths[i] + 1, terminated or truncated
            record()
    return returns, lengths


def main(args: Args) -> None:
    """Play and print means and population standard deviations over episodes. Raises SystemExit 2 on bad input."""
    if args.episodes < 1 or not 0 <= args.seed < 2**63:
        fail(f"--episodes {args.episodes} must be at least 1 and --seed {args.seed} in [0, 2^63).")
    if args.video and args.video.suffix != ".mp4":
        fail(f"--video {args.video} must end in .mp4.")
    state = load_checkpoint(args.checkpoint)
    with make_env(state, args.video is not None) as env:  # closed also on failure: EGL is noisy else
        agent = load_agent(state, env)
        with recorder(env, args.video) if args.video else nullcontext(lambda: None) as record:
            returns, lengths = play(agent, env, args, record)
    result = {
        "env_id": state["args"]["env_id"], "algorithm": state["algorithm"], "global_step": state["global_step"],
        "episodes": args.episodes, "deterministic": not args.stochastic,
        "return_mean": np.mean(returns).item(), "return_std": np.std(returns).item(),
        "length_mean": np.mean(lengths).item(), "length_std": np.std(lengths).item(),
        "returns": returns, "lengths": lengths,
    }  # fmt: skip
    scores = "return {return_mean:.1f} ± {return_std:.1f}, length {length_mean:.1f} ± {length_std:.1f}"
    print(json.dumps(result) if args.json else ("{env_id}, {episodes} episodes: " + scores).format_map(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
