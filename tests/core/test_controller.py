"""The activation rate is where it should be: on simulated loss streams, over targets, scales and drifts."""

from __future__ import annotations

import pytest
import torch

from lightning_ast.core.controller import PIController
from lightning_ast.core.selector import SampleSelector

TARGETS = (0.06, 0.1, 0.2, 0.4, 0.6, 0.8)
STEPS, SETTLED, WINDOW = 400, 100, 100


def stream(kind: str, batch: int, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(batch, generator=generator)
    if kind == "exponential":  # losses in mid-training
        return -(1 - u).log()
    if kind == "lognormal":  # heavy tail: label noise
        return (1.5 * torch.randn(batch, generator=generator)).exp()
    return u**3  # most samples learned, as EL2N looks late


def rates(kind: str, target: float, *, scale: float = 1.0, drift: float = 0.0, gate: str = "soft") -> torch.Tensor:
    """Activation rate of each step; from step 150 the losses drift by 10**drift in 200 steps."""
    selector = SampleSelector(target_activation_rate=target, gate=gate, seed=3)
    generator = torch.Generator().manual_seed(11)
    observed = []
    for step in range(STEPS):
        factor = scale * 10 ** (drift * min(1.0, max(0.0, (step - 150) / 200)))
        selector.select(stream(kind, 128, generator) * factor)
        observed.append(selector.activation_rate)
    return torch.tensor(observed)


def worst(observed: torch.Tensor, target: float) -> float:
    """Largest relative error of the mean rate over any 100 consecutive steps after the first 100."""
    means = observed[SETTLED:].unfold(0, WINDOW, 1).mean(1)
    return float((means / target - 1).abs().max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["exponential", "lognormal", "learned"])
def test_within_5_percent_after_100_steps(kind: str, target: float) -> None:
    for scale in (1e-3, 1.0, 1e3):
        assert worst(rates(kind, target, scale=scale), target) < 0.05


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("drift", [-1.0, 1.0])
def test_stays_there_under_tenfold_drift(target: float, drift: float) -> None:
    for kind in ("exponential", "lognormal", "learned"):
        assert worst(rates(kind, target, drift=drift), target) < 0.05


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_hard_threshold_is_held_too(target: float) -> None:
    assert worst(rates("exponential", target, gate="threshold"), target) < 0.05
    assert worst(rates("exponential", target, gate="threshold", drift=-1.0), target) < 0.05


def test_first_sparse_step_is_right() -> None:
    assert rates("exponential", 0.4)[0] == pytest.approx(0.4, abs=1.5 / 128)


def reference_original(
    observed: list[float], target: float, kp: float, ki: float, alpha: float, start: float
) -> list[float]:
    """The published package's update, line by line."""
    threshold, integral, ema, thresholds = start, 0.0, target, []
    for rate in observed:
        ema = alpha * rate + (1 - alpha) * ema
        error = ema - target
        if 0.5 < threshold < 10.0:
            integral = max(-100, min(100, integral + error))
        else:
            integral *= 0.90
        threshold = max(0.5, min(10.0, threshold + kp * error + ki * integral))
        thresholds.append(threshold)
    return thresholds


@pytest.mark.parametrize(
    ("target", "gains"),
    [
        (0.4, {"kp": 0.005, "ki": 0.0001, "ema_alpha": 0.1, "initial_threshold": 3.0}),
        (0.1, {"kp": 0.0015, "ki": 0.00005, "ema_alpha": 0.3, "initial_threshold": 0.5}),
        (0.06, {"kp": 0.0008, "ki": 0.000002, "ema_alpha": 0.3, "initial_threshold": 0.5}),
    ],
)
def test_original_rule_is_reproduced(target: float, gains: dict[str, float]) -> None:
    observed = torch.rand(2000, generator=torch.Generator().manual_seed(0)).tolist()
    controller = PIController(preset="original", **gains)
    got = []
    for rate in observed:
        controller.update(rate, target=target)
        got.append(float(controller.threshold(None, target=target)))
    expected = reference_original(
        observed, target, gains["kp"], gains["ki"], gains["ema_alpha"], gains["initial_threshold"]
    )
    assert got == pytest.approx(expected, rel=1e-12)


def test_original_preset_is_the_40_percent_set() -> None:
    controller = PIController(preset="original")
    assert (controller.kp, controller.ki, controller.ema_alpha) == (0.005, 0.0001, 0.1)
    assert controller.threshold_bounds == (0.5, 10.0)
    assert float(controller.threshold(None, target=0.4)) == 3.0


def test_original_gains_sit_on_their_floor_for_hundreds_of_steps() -> None:
    """Why it is not the default: from threshold 3.0 on losses that fall, it lets 10 % (its fallback) through."""
    selector = SampleSelector(
        target_activation_rate=0.4, gate="threshold", controller=PIController(preset="original"), min_selected=0.1
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        selector.select(stream("exponential", 128, generator) * 0.5)
        assert selector.activation_rate < 0.2


def test_anti_windup_at_the_fallback() -> None:
    held, free = PIController(), PIController()
    for _ in range(200):
        held.update(0.25, target=0.1, at_minimum=True)
        free.update(0.25, target=0.1)
    assert held.state_dict()["integral"] == 0.0
    assert free.state_dict()["integral"] == 50.0, "clamped at integral_limit"


def test_state_round_trip_continues_exactly() -> None:
    one, other = (SampleSelector(target_activation_rate=0.3, seed=5) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    batches = [stream("exponential", 64, generator) for _ in range(40)]
    for batch in batches[:20]:
        one.select(batch)
    other.load_state_dict(one.state_dict())
    for batch in batches[20:]:
        a, b = one.select(batch), other.select(batch)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)
    assert float(one.last_threshold) == float(other.last_threshold)


def test_reset_forgets() -> None:
    controller = PIController()
    controller.threshold(torch.tensor(2.0), target=0.5)
    controller.update(0.9, target=0.5)
    controller.reset()
    assert controller.state_dict() == PIController().state_dict()


def test_all_faults_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"kp and ki.*ema_alpha.*threshold_bounds.*integral_limit.*feedforward_alpha"):
        PIController(kp=-1, ema_alpha=0, threshold_bounds=(2, 1), integral_limit=0, feedforward_alpha=2)
    with pytest.raises(ValueError, match="preset"):
        PIController(preset="best")
    with pytest.raises(ValueError, match="initial_threshold must be > 0"):
        PIController(initial_threshold=0.0)


def test_feedforward_needs_the_batch() -> None:
    with pytest.raises(ValueError, match="solve_threshold"):
        PIController().threshold(None, target=0.4)


def test_threshold_bounds_hold() -> None:
    controller = PIController(threshold_bounds=(0.5, 2.0))
    assert float(controller.threshold(torch.tensor(100.0), target=0.4)) == 2.0
    fresh = PIController(threshold_bounds=(0.5, 2.0))
    assert float(fresh.threshold(torch.tensor(1e-9), target=0.4)) == 0.5


@pytest.mark.parametrize("at", [0, 30])
def test_a_batch_without_significance_teaches_nothing(at: int) -> None:
    """All labels ignored, all margins met: the rate is back at its target with the next batch."""
    selector = SampleSelector(target_activation_rate=0.2)
    generator = torch.Generator().manual_seed(0)
    observed = []
    for step in range(60):
        batch = stream("exponential", 128, generator)
        selector.select(torch.zeros(128) if step == at else batch)
        observed.append(selector.activation_rate)
    assert observed[at] == pytest.approx(0.2, abs=0.02), "none matters more than another: a random share"
    for rate in observed[at + 1 : at + 20]:
        assert rate == pytest.approx(0.2, abs=0.06)


def test_one_batch_of_another_scale_does_not_throw_it_off() -> None:
    selector = SampleSelector(target_activation_rate=0.2)
    generator = torch.Generator().manual_seed(0)
    observed = []
    for step in range(60):
        selector.select(stream("exponential", 128, generator) * (1e6 if step == 30 else 1.0))
        observed.append(selector.activation_rate)
    assert sum(observed[31:51]) / 20 == pytest.approx(0.2, abs=0.05)


def trained(controller: PIController) -> PIController:
    for _ in range(60):
        if controller.uses_feedforward:
            controller.threshold(torch.tensor(0.5), target=0.3)
        controller.update(0.9, target=0.3)
    return controller


def test_a_controller_of_another_kind_begins_anew() -> None:
    """A logarithm is no threshold: only the running rate means the same."""
    for one, other in [
        (PIController(), PIController(preset="original")),
        (PIController(preset="original"), PIController()),
    ]:
        state = trained(one).state_dict()
        other.load_state_dict(state)
        fresh = type(other)(preset="default" if other.uses_feedforward else "original").state_dict()
        assert {**other.state_dict(), "activation_rate_ema": None, "held_ema": None} == fresh
        assert other.activation_rate_ema == state["activation_rate_ema"]


def test_a_smaller_limit_of_the_integral_holds_at_once() -> None:
    other = PIController(integral_limit=5.0)
    other.load_state_dict(trained(PIController()).state_dict())
    assert other.state_dict()["integral"] == 5.0


def test_a_controllers_first_state_can_be_loaded() -> None:
    """That of the first release: neither its kind nor its limit was written."""
    state = trained(PIController()).state_dict()
    for name in ("feedforward", "integral_limit"):
        del state[name]
    other = PIController()
    other.load_state_dict(state)
    assert torch.equal(
        other.threshold(torch.tensor(0.5), target=0.3), trained(PIController()).threshold(torch.tensor(0.5), target=0.3)
    )
