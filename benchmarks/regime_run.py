"""What one run of the regime map is: its data, network, length, policy and seed, and the name that its record has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tables need plans without torch and Lightning
    from lightning_ast.demo.data import DataName

__all__ = ["Option", "Regime", "Run"]

Option = str | int | float | bool


@dataclass(frozen=True)
class Regime:
    """A place on the map: all that the runs which are compared have in common.

    Attributes:
        data: The name of the data set.
        images: The number of different training images.
        network: The name of the network; see :data:`regime_networks.NETWORKS`.
        width: The width of the network.
        epochs: The length of a dense run.
        batch_size: The samples of a dense batch.
        redundancy: How often each image is in the data set; each copy is augmented by itself.
        imbalance: The images of the most frequent class to those of the rarest.
        noise: The share of the training labels that are wrong, in [0, 1).
    """

    data: DataName = "fashion_mnist"
    images: int = 20_000
    network: str = "resnet"
    width: int = 16
    epochs: int = 24
    batch_size: int = 128
    redundancy: int = 1
    imbalance: float = 1.0
    noise: float = 0.0

    @property
    def name(self) -> str:
        """Return a name for files, which leaves out what is usual."""
        parts = [self.data, f"n{self.images}", f"{self.network}{self.width}", f"e{self.epochs}", f"b{self.batch_size}"]
        parts += [f"redundancy{self.redundancy}"] * (self.redundancy > 1)
        parts += [f"imbalance{self.imbalance:g}"] * (self.imbalance > 1)
        parts += [f"noise{self.noise:g}"] * (self.noise > 0)
        return "-".join(parts)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        regime: What it shares with the runs that it is compared with.
        policy: The name of the policy; see :data:`policies.POLICIES`.
        options: The settings of the policy, by name and in this order.
        seed: The seed of the weights, of the order of the data and of wrong labels.
    """

    regime: Regime
    policy: str
    options: tuple[tuple[str, Option], ...] = ()
    seed: int = 0

    @property
    def setting(self) -> str:
        """Return the policy with its settings, for the name of the record."""
        return "-".join([self.policy, *(f"{key}{_written(value)}" for key, value in self.options)])

    @property
    def name(self) -> str:
        """Return the name of the record."""
        return f"{self.regime.name}-{self.setting}-s{self.seed}"

    @property
    def epochs(self) -> int:
        """Return the epochs of this run: those of the regime, if it is not a shortened one."""
        return int(self.option("length", self.regime.epochs))

    def option(self, name: str, default: Any = None) -> Any:
        """Return a setting of the policy, or the default where it is not given."""
        return dict(self.options).get(name, default)

    def with_seed(self, seed: int) -> Run:
        """Return the same run with another seed."""
        return replace(self, seed=seed)

    def facts(self) -> dict[str, Any]:
        """Return everything that defines the run, for its record."""
        return {
            "regime": asdict(self.regime),
            "policy": self.policy,
            "options": dict(self.options),
            "setting": self.setting,
            "epochs": self.epochs,
            "seed": self.seed,
        }


def _written(value: Option) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
