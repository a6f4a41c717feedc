# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.3.7",
#     "numpy==1.26.4",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "imageio==2.23.0",
#     "imageio-ffmpeg==0.3.0",
#     "setuptools==79.0.1",
# ]
# ///
"""Play a checkpoint of any script here: returns and lengths of episodes, a video of them.

Run: python enjoy.py runs/RUN_NAME/checkpoint.pt --episodes 10

    read what the script saved                                       load_checkpoint
    import that script                                               import_script
    make one environment                                             make_env
    the script's agent with the saved weights                        load_agent
    for each episode:                                                play
        step the environment with the policy, film what it shows     play_episode, recorder
    print means and standard deviations                              summary
"""

import importlib
import json
import os
import sys
import traceback
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint.pt of a run
    episodes: int | None = None  # episodes to play; default 10, with --video 1
    max_steps: int = 10_000  # an episode that has not ended by then is cut off
    stochastic: bool = False  # sample actions, as in training; default: the mean or likeliest one
    video: Path | None = None  # .mp4 to write: a frame at each reset and after each step
    json: bool = False  # print one JSON object, with every episode's return and length
    seed: int = 1  # of the environment and of sampling

    def __post_init__(self):
        if self.episodes is None:
            self.episodes = 1 if self.video else 10
        for name in ("episodes", "max_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must lie in [0, 2^63).")
        if self.video and self.video.suffix != ".mp4":
            raise ValueError(f"--video {self.video} must end in .mp4.")


def fail(sentence, code=2):
    """End the program with one sentence on stderr. Code 2: bad input; 1: the play broke down."""
    print(f"enjoy: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)


def described(error):
    """The error's type and, if it has one, its message."""
    return traceback.format_exception_only(error)[-1].strip()


# ---- Checkpoint, script, environment, agent --------------------------------------------------


def load_checkpoint(path):
    """What a script saved, on the CPU; refuses what is missing or damaged."""
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        for key in ("algorithm", "agent", "args", "global_step"):
            state[key]  # raises where it is missing
        state["algorithm"] + state["args"]["env_id"]  # raises where one is no text
    except Exception as error:  # damage raises anything from EOFError to UnpicklingError
        problem = "no checkpoint or damaged" if path.exists() else "missing"
        fail(f"{path} is {problem} ({type(error).__name__}): name the checkpoint.pt of a run.")
    return state


def import_script(name, checkpoint):
    """The script that the checkpoint names: forks need not lie beside this file."""
    for folder in [Path.cwd(), *checkpoint.resolve().parents, Path(__file__).resolve().parent]:
        path = folder / f"{name}.py"
        if Path(name).name != name or not path.is_file():
            continue
        sys.path.insert(0, str(folder))
        try:
            return importlib.import_module(name)
        except Exception as error:  # whatever a fork raises
            fail(f"{path} cannot be imported: {described(error)}.")
    fail(
        f"the checkpoint says algorithm {name!r}, there is no {name}.py in the current folder, "
        f"in those above {checkpoint} or beside enjoy.py: put the script that trained it there "
        "under that name, the one it had then."
    )


class ProcgenGame(gym.Env):
    """One Procgen game on the levels that the checkpoint was trained on.

    Procgen starts the next episode within the step that ends one: the last frame shown is already
    the next episode's first, and reset only says where that begins."""

    metadata = {"render_fps": 15}  # noqa: RUF012

    def __init__(self, module, saved_args, render):
        known = {field.name for field in fields(module.Args)}
        self.args = module.Args(**{name: v for name, v in saved_args.items() if name in known})
        self.args.num_envs = 1
        self.make = module.Procgen
        self.mode = "rgb_array" if render else None
        self.seed = -1  # of the games
        self.ended = False  # there is none that could be followed by the next
        self.observation_space = module.Procgen.single_observation_space
        self.action_space = module.Procgen.single_action_space
        self.spec = gym.envs.registration.EnvSpec(saved_args["env_id"])

    def reset(self, *, seed=None, options=None):
        """No episode of Procgen can be left: after one that was cut off other games begin."""
        if seed is not None or not self.ended:
            self.seed = self.seed + 1 if seed is None else seed
            self.games = self.make(self.args, self.seed, render_mode=self.mode)
        obs, info = self.games.reset()
        return obs[0], info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.games.step(action[None])
        self.ended = terminated[0]
        return obs[0], reward[0], terminated[0], truncated[0], info

    def render(self):
        return self.games.env.get_info()[0]["rgb"]


def make_env(module, saved_args, render):
    """One environment, its pictures tried; refuses one that cannot be made or rendered."""
    env_id = saved_args["env_id"]
    if hasattr(module, "Procgen"):
        return ProcgenGame(module, saved_args, render)
    gym.logger.min_level = gym.logger.ERROR  # "v4 is out of date" was the training run's choice
    options = {"render_mode": "rgb_array"} if render else {}  # not every environment takes one
    aim = "made"
    try:
        env = gym.make(env_id, **options)
        if render:
            aim = "rendered"
            env.reset(seed=0)
            if np.ndim(env.render()) != 3:
                raise TypeError("its render() returns no picture")
    except Exception as error:  # OpenGL without its library raises nearly anything
        sys.unraisablehook = lambda _: None  # MuJoCo's half-made viewer raises again when freed
        sentence = f"{env_id} cannot be {aim}: {described(error)}"
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        if render and any("mujoco" in file.parts for file in files):
            sentence += "; without a display MuJoCo needs EGL, Debian's libegl1"
        fail(f"{sentence.rstrip('.')}.")
    return env


def load_agent(module, state, env):
    """The script's Agent with the saved weights."""
    options = {}
    for name in ("shared", "activation", "channels", "hidden"):
        if name in state["args"]:
            options[name] = state["args"][name]
    try:
        agent = module.Agent(env.observation_space, env.action_space, **options)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # other spaces, other sizes, no Agent
        fail(
            f"the checkpoint does not fit the Agent of {module.__file__} on {env.spec.id} "
            f"({type(error).__name__}): the script has changed since, or another one of "
            "that name is meant."
        )
    return agent


# ---- Playing ---------------------------------------------------------------------------------


class Episode(NamedTuple):
    """What an episode came to."""

    score: float  # the sum of its rewards
    length: int  # in steps
    ended: bool  # by itself, not by --max-steps


def play_episode(agent, env, args, record, seed, title):
    """One episode; seed None goes on with the environment's generator."""
    obs, _ = env.reset(seed=seed)
    record()
    score = 0.0
    limit = min(args.max_steps, env.spec.max_episode_steps or args.max_steps)
    look = {"desc": title, "total": limit, "unit": "step", "leave": False, "disable": None}
    for step in tqdm(range(1, args.max_steps + 1), **look):
        obs = np.asarray(obs, env.observation_space.dtype)  # as vector environments hand it out
        _, env_action = agent.act(torch.tensor(obs)[None], not args.stochastic)
        obs, reward, terminated, truncated, _ = env.step(env_action.numpy()[0])
        record()
        score += float(reward)
        if terminated or truncated:
            return Episode(score, step, True)
    return Episode(score, args.max_steps, False)


def play(agent, env, args, record):
    """args.episodes Episodes, one after the other."""
    torch.manual_seed(args.seed)
    episodes = []
    for i in range(args.episodes):
        seed = args.seed if i == 0 else None
        title = f"episode {i + 1} of {args.episodes}"
        episodes.append(play_episode(agent, env, args, record, seed, title))
    return episodes


@contextmanager
def recorder(env, path):
    """Function that adds what env shows now to the video; path appears when that is complete."""
    try:
        import imageio.v2 as imageio
        from imageio_ffmpeg import count_frames_and_secs
    except ImportError:
        fail("--video needs imageio and FFmpeg: pip install imageio imageio-ffmpeg.")
    partial = path.with_suffix(".partial.mp4")
    fps = env.metadata.get("render_fps") or 30
    options = {"format": "FFMPEG", "fps": fps, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
    frames = 0

    def record():
        nonlocal frames
        frame = env.render()
        height, width, _ = frame.shape
        writer.append_data(frame[: height // 2 * 2, : width // 2 * 2])  # yuv420p takes even sizes
        frames += 1

    try:
        partial.touch()
        with imageio.get_writer(partial, **options) as writer:
            yield record
        written = 0
        with suppress(RuntimeError):  # FFmpeg cannot read it
            written, _ = count_frames_and_secs(str(partial))
        if written != frames:  # imageio does not tell that the disk was full
            fail(f"--video {path} cannot be written: FFmpeg left it incomplete.")
        partial.replace(path)
    except OSError as error:
        fail(f"--video {path} cannot be written: {error.strerror or 'FFmpeg failed'}.")
    finally:
        with suppress(OSError):
            partial.unlink()


# ---- Result ----------------------------------------------------------------------------------


def as_json(args, state, env_id, episodes):
    """Everything as one JSON object; standard deviations are those of the episodes played."""
    scores, lengths, ended = (list(column) for column in zip(*episodes))
    result = {
        "env_id": env_id,
        "algorithm": state["algorithm"],
        "global_step": state["global_step"],
        "episodes": args.episodes,
        "deterministic": not args.stochastic,
        "return_mean": np.mean(scores).item(),
        "return_std": np.std(scores).item(),
        "length_mean": np.mean(lengths).item(),
        "length_std": np.std(lengths).item(),
        "returns": scores,
        "lengths": lengths,
        "cut_off": ended.count(False),
    }
    return json.dumps(result)


def summary(args, env_id, episodes):
    """The same for people, in one line."""
    scores, lengths, ended = zip(*episodes)
    noise = "with sampled actions, as in training" if args.stochastic else "without noise"
    plural = "s" if args.episodes > 1 else ""
    line = f"{env_id}, {args.episodes} episode{plural} {noise}: "
    line += f"return {spread(scores)}, length {spread(lengths)}"
    if not all(ended):
        line += f"; {ended.count(False)} cut off at --max-steps {args.max_steps}"
    return line


def spread(values):
    """Mean and, of several values, standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def main(args: Args):
    """Play and print. Raises SystemExit 2 for what cannot be played."""
    if args.video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported
    state = load_checkpoint(args.checkpoint)
    module = import_script(state["algorithm"], args.checkpoint)
    with make_env(module, state["args"], bool(args.video)) as env:  # closed also on failure
        agent = load_agent(module, state, env)
        film = recorder(env, args.video) if args.video else nullcontext(lambda: None)
        with film as record:
            episodes = play(agent, env, args, record)
        env_id = env.spec.id  # with the version that was made
    if args.json:
        print(as_json(args, state, env_id, episodes))
    else:
        print(summary(args, env_id, episodes))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    try:
        main(arguments)
    except KeyboardInterrupt:
        fail("stopped by signal 2.", 130)
    except Exception as error:  # of the environment
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        fail(f"{described(error)} ({where}).", 1)
