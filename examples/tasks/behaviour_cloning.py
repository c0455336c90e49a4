"""Clone a scripted expert that balances a pole: its states and actions are the samples, rollouts the measure.

    python examples/tasks/behaviour_cloning.py --method ours

Needs gymnasium. The expert is a linear rule; it pushes towards the side that the pole falls to. Most of its states
are easy to copy, those near its switching line are not.
"""

import functools
from typing import Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.recipes import Comparison, chance, one_cycle

Method = Literal["expert", "dense", "shortened", "random", "ours"]
RUNS = Comparison(
    epochs=6,
    shortened=0.67,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.51, "significance": chance},
        "ours": {"mode": "prune", "target_coverage": 0.97},
    },
)
DEMONSTRATIONS = 20  # episodes of the expert
ROLLOUTS = 50
STEPS = 500  # of an episode, at most


def expert(state):
    """Return the action of the expert: 1 pushes to the right."""
    place, speed, angle, turning = state
    return int(0.3 * place + 0.6 * speed + 4.0 * angle + 1.0 * turning > 0)


def rollout(policy, seed, *, slip=0.0):
    """Play one episode; return the states, what the policy wanted, and whether the pole stood to the end.

    Args:
        policy: From a state ``(4,)`` to an action.
        seed: The seed of the start and the slips.
        slip: The share of the steps with a random action in place of the policy's.
    """
    import gymnasium  # of the extra "recipes"

    draw = np.random.default_rng(seed)
    environment = gymnasium.make("CartPole-v1", max_episode_steps=STEPS)
    state, _ = environment.reset(seed=seed, options={"low": -0.15, "high": 0.15})
    states = []
    actions = []
    fell = stopped = False
    while not (fell or stopped):
        states.append(state)
        actions.append(policy(state))
        done = int(draw.integers(2)) if draw.random() < slip else actions[-1]
        state, _, fell, stopped, _ = environment.step(done)
    return np.stack(states), np.array(actions), not fell


def success(policy):
    """Return the share of the rollouts in which the pole stands to the end; a fifth of the actions is random."""
    return sum(rollout(policy, 1000 + each, slip=0.2)[2] for each in range(ROLLOUTS)) / ROLLOUTS


@functools.cache
def demonstrations():
    """Record the expert, which slips now and then, so that states off its path are among the samples too."""
    episodes = [rollout(expert, seed, slip=0.3) for seed in range(DEMONSTRATIONS)]
    states = torch.from_numpy(np.concatenate([states for states, _, _ in episodes])).float()
    actions = torch.from_numpy(np.concatenate([actions for _, actions, _ in episodes])).long()
    return states, actions


class Clone(L.LightningModule):
    """A small network from the state to the scores of the actions."""

    def __init__(self, lr: float = 3e-3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        states, actions = batch
        return F.cross_entropy(self.net(states), actions)

    def act(self, state):
        """Return the action for one state."""
        with torch.no_grad():
            return int(self.net(torch.from_numpy(state)).argmax())

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr))


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train once; return the share of rollouts in which the pole stood to the end, and the work."""
    if method == "expert":  # what there is to reach
        return {"success": success(expert), "work": 0.0}
    states, actions = demonstrations()
    loader = DataLoader(TensorDataset(states, actions), batch_size=64, shuffle=True, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = Clone()
    trainer.fit(model, loader)
    return {"success": success(model.act), "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
