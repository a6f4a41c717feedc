"""enjoy.py on a real checkpoint: what it prints, records and refuses."""

import contextlib
import importlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, train

import enjoy
import rat_continuous
import rat_shared

SMALL = ["--total-timesteps", "256", "--num-envs", "4", "--num-steps", "32", "--device", "cpu"]
KEYS = [
    "env_id",
    "algorithm",
    "global_step",
    "episodes",
    "deterministic",
    "return_mean",
    "return_std",
    "length_mean",
    "length_std",
    "returns",
    "lengths",
    "cut_off",
]


class Endless(gym.Env):
    """Never ends; float64 observations that float32 cannot tell apart; shows no picture."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None, error=None):
        self.render_mode = render_mode
        self.error = error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([1.7e9]), {}

    def step(self, action):
        self.steps += 1
        return np.array([1.7e9 + self.steps]), 2.0, False, False, {}

    def render(self):
        if self.error:
            raise self.error


gym.register("Endless-v0", Endless, disable_env_checker=True)
gym.register("Endless-v1", Endless, kwargs={"error": RuntimeError("no window")})


def parse(*args):
    return tyro.cli(enjoy.Args, args=[str(arg) for arg in args])


def run(*args, **env):
    """enjoy.py in a process of its own."""
    command = [sys.executable, ROOT / "enjoy.py", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 120}
    return subprocess.run(command, env=env, **options)


def play(*args):
    """What enjoy.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        enjoy.main(parse(*args))
    return output.getvalue()


def played(*args):
    return json.loads(play(*args, "--json"))


def check_refusal(code, out, err, message):
    assert (code, out) == (2, "")
    assert re.fullmatch(r"enjoy: [^\n]+\.\n", err), err
    assert message in err


@pytest.fixture
def refuse(capfd, monkeypatch):
    """Function that plays and finds the refusal, whose sentence it returns."""

    def refuse(message, *args):
        with pytest.raises(SystemExit) as end:
            enjoy.main(parse(*args))
        out, err = capfd.readouterr()
        check_refusal(end.value.code, out, err, message)
        return err

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))
    capfd.readouterr()
    return refuse


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    options = ["--env-id", "InvertedPendulum-v5", "--output-dir", out, "--run-name", "tiny"]
    train("rat_continuous", *SMALL, *options)
    return out / "tiny" / "checkpoint.pt"


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    options = ["--env-id", "Endless-v0", "--output-dir", out, "--run-name", "endless"]
    train("rat_continuous", *SMALL, *options)
    return out / "endless" / "checkpoint.pt"


@pytest.fixture(scope="module")
def result(checkpoint):
    return played(checkpoint, "--episodes", 3)


def altered(checkpoint, folder, **changes):
    """The checkpoint with other entries; env_id stands for that of the arguments."""
    state = torch.load(checkpoint, weights_only=True)
    if "env_id" in changes:
        state["args"]["env_id"] = changes.pop("env_id")
    torch.save({**state, **changes}, folder / "altered.pt")
    return folder / "altered.pt"


# ---- What it prints --------------------------------------------------------------------------


def test_json_is_consistent_and_repeats(checkpoint, result):
    assert list(result) == KEYS
    assert (result["env_id"], result["algorithm"]) == ("InvertedPendulum-v5", "rat_continuous")
    assert (result["global_step"], result["episodes"], result["cut_off"]) == (256, 3, 0)
    assert result["deterministic"]
    for name in ("return", "length"):
        values = np.array(result[f"{name}s"])
        assert len(values) == 3
        mean = values.sum() / 3
        assert result[f"{name}_mean"] == pytest.approx(mean)
        assert result[f"{name}_std"] == pytest.approx((((values - mean) ** 2).sum() / 3) ** 0.5)
    assert len(set(result["returns"])) > 1  # one seed, but not one episode played three times
    assert played(checkpoint, "--episodes", 3) == result


def test_stochastic_differs_and_repeats(checkpoint, result):
    first, second = (played(checkpoint, "--episodes", 3, "--stochastic") for _ in range(2))
    assert first == second
    assert not first["deterministic"]
    assert first["returns"] != result["returns"]


def test_line(checkpoint, result):
    cells = []
    for name in ("return", "length"):
        cells.append(f"{name} {result[f'{name}_mean']:.1f} ± {result[f'{name}_std']:.1f}")
    line = f"InvertedPendulum-v5, 3 episodes without noise: {', '.join(cells)}\n"
    assert play(checkpoint, "--episodes", 3) == line


def test_line_of_one_noisy_episode(checkpoint):
    line = play(checkpoint, "--episodes", 1, "--stochastic")
    start = "InvertedPendulum-v5, 1 episode with sampled actions, as in training: "
    assert re.fullmatch(re.escape(start) + r"return \d+\.0, length \d+\.0\n", line)


def test_says_which_version_was_made(checkpoint, tmp_path):
    path = altered(checkpoint, tmp_path, env_id="InvertedPendulum")
    assert play(path, "--episodes", 1).startswith("InvertedPendulum-v5, ")


def test_returns_equal_a_loop_written_out(checkpoint, result):
    state = torch.load(checkpoint, weights_only=True)["agent"]
    weights = {name: value.numpy() for name, value in state.items()}
    env = gym.make("InvertedPendulum-v5")
    low, high = env.action_space.low, env.action_space.high
    returns, lengths = [], []
    for seed in (1, None, None):
        obs, _ = env.reset(seed=seed)
        rewards, done = [], False
        while not done:
            prior = 1 / (weights["normalizer.count"] + 1)
            std = np.sqrt(weights["normalizer.var"] + prior + 1e-5)
            x = ((obs - weights["normalizer.mean"]) / std).clip(-5, 5)
            for layer in ("0", "2", "4"):
                name = f"policy.mean.{layer}"
                x = weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]
                x = x if layer == "4" else x.clip(0)
            action = low + (np.tanh(x) + 1) / 2 * (high - low)
            obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            rewards.append(float(reward))
            done = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    assert (result["returns"], result["lengths"]) == (pytest.approx(returns), lengths)


# ---- How it plays ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["Tanh", "ReLU"])
def test_the_networks_are_those_that_were_trained(activation, tmp_path):
    options = ["--env-id", "InvertedPendulum-v5", "--output-dir", tmp_path, "--run-name", "x"]
    train("rat_shared", *SMALL, *options, "--activation", activation)
    state = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    agent = enjoy.load_agent(rat_shared, state, gym.make("InvertedPendulum-v5"))
    assert type(agent.trunk[3]).__name__ == activation


def test_an_endless_episode_is_cut_off_and_said_to_be(endless):
    line = play(endless, "--episodes", 2, "--max-steps", 7)
    assert "return 14.0 ± 0.0, length 7.0 ± 0.0; 2 cut off at --max-steps 7\n" in line
    assert played(endless, "--episodes", 2, "--max-steps", 7)["cut_off"] == 2
    assert parse(endless).max_steps == 10_000


def test_the_policy_sees_observations_as_the_environment_has_them():
    seen = []

    class Agent:
        def act(self, obs, deterministic):
            seen.append(obs)
            return None, torch.zeros(1, 1)

    args = parse("none.pt", "--episodes", 1, "--max-steps", 5)
    (episode,) = enjoy.play(Agent(), gym.make("Endless-v0"), args, lambda: None)
    assert episode == (10.0, 5, False)
    seen = torch.cat(seen)
    assert seen.dtype == torch.float64
    assert (seen[:, 0] - 1.7e9).tolist() == [0, 1, 2, 3, 4]


def test_progress_is_by_step_up_to_the_longest_episode(checkpoint, monkeypatch):
    shown = []

    def watched(steps, **look):
        shown.append((look["desc"], look["total"], look["disable"]))
        return steps

    monkeypatch.setattr(enjoy, "tqdm", watched)
    play(checkpoint, "--episodes", 2)
    play(checkpoint, "--episodes", 1, "--max-steps", 3)
    titles = ["episode 1 of 2", "episode 2 of 2", "episode 1 of 1"]
    assert shown == list(zip(titles, [1000, 1000, 3], [None] * 3))  # None: on terminals only


# ---- Video -----------------------------------------------------------------------------------


def test_a_video_is_of_one_episode_unless_more_are_asked_for():
    assert parse("x.pt").episodes == 10
    assert parse("x.pt", "--video", "a.mp4").episodes == 1
    assert parse("x.pt", "--video", "a.mp4", "--episodes", 4).episodes == 4


def test_video_holds_every_frame_and_leaves_the_play_as_it_was(checkpoint, result, tmp_path):
    video = tmp_path / "out.mp4"
    done = run(checkpoint, "--episodes", 3, "--json", "--video", video)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", result)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with imageio.get_reader(video) as reader:
        frames = [*iter(reader)]
        assert reader.get_meta_data()["fps"] == 25
    assert (len(frames), frames[0].shape) == (sum(result["lengths"]) + 3, (480, 480, 3))
    assert frames[0].std() > 5  # a picture
    last = result["lengths"][0]  # of the first episode; the pole has fallen over since frame 0
    assert np.abs(frames[last].astype(int) - frames[0]).max() > 40


class Screen:
    """An environment that shows grey."""

    metadata = {"render_fps": 20}  # noqa: RUF012

    def render(self):
        return np.full((33, 51, 3), 200, dtype=np.uint8)


def test_odd_frames_lose_a_row_and_a_column(tmp_path):
    with enjoy.recorder(Screen(), tmp_path / "odd.mp4") as record:
        record()
        record()
    frames = imageio.get_reader(tmp_path / "odd.mp4")
    assert [frame.shape for frame in frames] == [(32, 50, 3)] * 2


def test_interrupted_video_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), enjoy.recorder(Screen(), tmp_path / "out.mp4") as record:
        record()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message", [("no/out.mp4", "No such file or directory"), ("folder.mp4", "directory")]
)
def test_refuses_unwritable_video(tmp_path, capfd, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(SystemExit) as end, enjoy.recorder(Screen(), tmp_path / name) as record:
        record()
    check_refusal(end.value.code, *capfd.readouterr(), message)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_full_disk_leaves_no_video(tmp_path, capfd):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as end, enjoy.recorder(Screen(), tmp_path / "a.mp4") as record:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # bytes; FFmpeg inherits it
        try:
            record()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    check_refusal(end.value.code, *capfd.readouterr(), "a.mp4 cannot be written")
    assert not list(tmp_path.iterdir())


def test_says_that_mujoco_needs_egl(checkpoint, tmp_path):
    done = run(checkpoint, "--video", tmp_path / "out.mp4", MUJOCO_GL="nonsense")
    check_refusal(done.returncode, done.stdout, done.stderr, "libegl1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("Endless-v0", "cannot be rendered: TypeError: its render() returns no picture"),
        ("Endless-v1", "cannot be rendered: RuntimeError: no window"),
        ("Pendulum-v1", "pygame is not installed"),
        ("Nowhere-v0", "cannot be made: gymnasium.error.NameNotFound"),
    ],
)
def test_other_pictures_have_other_hints(
    checkpoint, tmp_path, refuse, monkeypatch, env_id, message
):
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    path = altered(checkpoint, tmp_path, env_id=env_id)
    assert "EGL" not in refuse(message, path, "--video", tmp_path / "out.mp4")


def test_procgens_next_episode_is_a_new_game_where_one_was_cut_off():
    made = []

    class Games:
        single_observation_space = single_action_space = None

        def __init__(self, args, seed, render_mode):
            made.append(seed)

        def reset(self):
            return [0], {}

        def step(self, action):
            return [0], [0.0], [action[0]], [False], {}

    module = types.SimpleNamespace(Args=rat_continuous.Args, Procgen=Games)
    game = enjoy.ProcgenGame(module, {"env_id": "starpilot"}, render=False)
    game.reset(seed=5)
    game.step(np.array(True))
    game.reset()  # the next episode of the same game
    assert made == [5]
    game.step(np.array(False))
    game.reset()
    assert made == [5, 6]


# ---- The script that a checkpoint names ------------------------------------------------------


@pytest.fixture
def fork_search(tmp_path, monkeypatch):
    """Folders that are searched, in their order."""
    for folder in ("current", "above/runs/NAME", "beside"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(enjoy, "__file__", str(tmp_path / "beside" / "enjoy.py"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rat", raising=False)
    importlib.invalidate_caches()
    return [tmp_path / name for name in ("current", "above/runs/NAME", "above", "beside")]


@pytest.mark.parametrize(
    ("place", "name"), [(0, "my_rat"), (1, "my_rat"), (2, "my-rat"), (3, "my_rat")]
)
def test_a_fork_is_found_where_it_is_first(fork_search, place, name):
    for folder in fork_search[place:]:
        (folder / f"{name}.py").write_text("Agent = None")
    module = enjoy.import_script(name, Path("../above/runs/NAME/checkpoint.pt"))
    sys.modules.pop(name)
    assert Path(module.__file__) == fork_search[place] / f"{name}.py"


def test_a_fork_that_is_not_found_is_told_what_to_do(fork_search, capfd):
    with pytest.raises(SystemExit) as end:
        enjoy.import_script("my_rat", Path("x.pt"))
    out, err = capfd.readouterr()
    check_refusal(end.value.code, out, err, "the checkpoint says algorithm 'my_rat', there is no")
    assert "under that name, the one it had then" in err


def test_a_fork_that_cannot_be_imported_is_named(fork_search, capfd):
    (fork_search[0] / "my_rat.py").write_text("import nonsense")
    with pytest.raises(SystemExit) as end:
        enjoy.import_script("my_rat", Path("x.pt"))
    message = "my_rat.py cannot be imported: ModuleNotFoundError: No module named 'nonsense'"
    check_refusal(end.value.code, *capfd.readouterr(), message)


def test_a_fork_with_other_networks_is_played(fork_search, capfd):
    source = (ROOT / "rat_continuous.py").read_text()
    fork = source.replace("hidden=256", "hidden=32")
    assert source != fork
    (fork_search[2] / "my_rat.py").write_text(fork)
    sys.path.insert(0, str(fork_search[2]))
    options = ["--env-id", "InvertedPendulum-v5", "--output-dir", fork_search[2] / "runs"]
    train("my_rat", *SMALL, *options, "--run-name", "a")
    sys.modules.pop("my_rat")
    sys.path.pop(0)
    done = played(fork_search[2] / "runs" / "a" / "checkpoint.pt", "--episodes", 1)
    sys.modules.pop("my_rat")
    assert (done["algorithm"], done["global_step"]) == ("my_rat", 256)


# ---- What it refuses -------------------------------------------------------------------------


def old_names(state):
    """The networks as an older version named them."""
    agent = state["agent"]
    state["agent"] = {name.replace("policy.", "actor."): agent[name] for name in agent}


ALTERED = {
    "none of ours": (lambda state: state.pop("algorithm"), "no checkpoint"),
    "no env_id": (lambda state: state["args"].pop("env_id"), "no checkpoint"),
    "unknown algorithm": (lambda state: state.update(algorithm="sac"), "'sac'"),
    "algorithm elsewhere": (
        lambda state: state.update(algorithm="tests/test_enjoy"),
        "'tests/test_enjoy'",
    ),
    "algorithm without Agent": (lambda state: state.update(algorithm="enjoy"), "does not fit"),
    "unknown environment": (lambda state: state["args"].update(env_id="Nowhere-v0"), "Nowhere"),
    "other environment": (lambda state: state["args"].update(env_id="Hopper-v5"), "does not fit"),
    "other actions": (lambda state: state["args"].update(env_id="CartPole-v1"), "does not fit"),
    "missing weight": (lambda state: state["agent"].pop("policy.mean.0.bias"), "does not fit"),
    "older version": (old_names, "the script has changed since"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_refuses_altered_checkpoint(checkpoint, tmp_path, refuse, case):
    alter, message = ALTERED[case]
    state = torch.load(checkpoint, weights_only=True)
    alter(state)
    torch.save(state, tmp_path / "altered.pt")
    refuse(message, tmp_path / "altered.pt")


def test_refuses_missing_or_damaged_file(checkpoint, tmp_path, refuse):
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refuse("missing", tmp_path / "none.pt")
    for name in ("half.pt", "text.pt", "tensor.pt", ""):
        refuse("damaged", tmp_path / name)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--episodes", 0),
        ("--max-steps", 0),
        ("--seed", -1),
        ("--seed", 2**63),
        ("--video", "out.gif"),
    ],
)
def test_refuses_argument(capsys, option, value):
    with pytest.raises(SystemExit) as end:
        parse("x.pt", option, value)
    assert end.value.code == 2
    assert f"{option} {value} must" in capsys.readouterr().err


def test_an_environment_that_breaks_down_ends_with_one_sentence(endless, tmp_path):
    breaking = (
        "import gymnasium as gym, numpy as np\n"
        "class Boom(gym.Env):\n"
        "    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)\n"
        "    action_space = gym.spaces.Box(-1, 1, (1,))\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        return np.zeros(1), {}\n"
        "    def step(self, action):\n"
        "        raise ValueError('simulator exploded')\n"
        "gym.register('Boom-v0', Boom)\n"
    )
    (tmp_path / "boom.py").write_text(breaking)
    path = altered(endless, tmp_path, env_id="boom:Boom-v0")
    done = run(path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "enjoy: ValueError: simulator exploded (boom.py, line 8).\n"
