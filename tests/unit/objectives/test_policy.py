"""The policy-gradient methods against cases worked by hand, and against their formulae in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.objectives.best_of import BestOf, best_of, kept_loss
from fettle.objectives.grpo import GRPO, group_advantages, grpo_loss
from fettle.objectives.policy import KL, Answers, PolicyGradient, Tokens, compare, each_weight, k3, surrogate, whitened
from fettle.objectives.ppo import PPO, gae, ppo_loss, token_rewards, value_loss
from fettle.objectives.reinforce import REINFORCE, reinforce_loss
from fettle.objectives.rloo import RLOO, leave_one_out, sequence_loss

LENGTHS = torch.tensor([2, 1, 3, 2])


def answers(rewards: list[float], group: int = 2, **given: Tensor) -> Answers:
    old = given.pop("old", torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.5, -0.25, -3.0, -1.0]))
    return Answers(group, LENGTHS, torch.tensor(rewards, dtype=torch.float64), old, **given)


def tokens(per: str = "token", seed: int = 0, **given: Tensor) -> tuple[Tensor, Tokens]:
    """Log-probabilities of 8 tokens in 4 answers, and what a batch of them holds."""
    torch.manual_seed(seed)
    weights, counts = each_weight(LENGTHS, per, 4)  # type: ignore[arg-type]
    owner = torch.repeat_interleave(torch.arange(4), LENGTHS)
    old = -torch.rand(8, dtype=torch.float64) * 3
    logps = (old + 0.4 * torch.randn(8, dtype=torch.float64)).requires_grad_()
    made = {"advantages": torch.tensor([1.0, -0.5, 2.0, -2.0], dtype=torch.float64)[owner], "old": old} | given
    return logps, Tokens(weights[owner].double(), counts.sum(), owner, **made)  # type: ignore[arg-type]


# Advantages.


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0])
    found = group_advantages(rewards, 2)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    one = 1.0 / (math.sqrt(2.0) + 1e-4)
    assert torch.allclose(found, torch.tensor([half, -half, -one, one]), atol=1e-7)
    assert group_advantages(rewards, 2, "none").tolist() == [0.5, -0.5, -1.0, 1.0]
    spread = float(rewards.std())
    assert torch.allclose(group_advantages(rewards, 2, "batch") * (spread + 1e-4), torch.tensor([0.5, -0.5, -1.0, 1.0]))


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out(torch.tensor([1.0, 0.0, 2.0, 6.0, 6.0, 6.0]), 3).tolist() == [0.0, -1.5, 1.5, 0.0, 0.0, 0.0]


def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_1() -> None:
    rewards = torch.randn(12, dtype=torch.float64)
    assert torch.allclose(leave_one_out(rewards, 4), group_advantages(rewards, 4, "none") * 4 / 3)


def test_gae_by_hand() -> None:
    """Answers of 2 and 1 tokens, gamma 0.5, lambda 0.5: d = r + gamma v' - v, A_1 = d_1 + gamma lambda A_2."""
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 1.0])
    second = 2.0 - 3.0
    first = 1.0 + 0.5 * 3.0 - 1.0 + 0.25 * second
    assert gae(rewards, values, torch.tensor([2, 1]), 0.5, 0.5).tolist() == [first, second, 3.0]


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_the_sum_of_its_definition(lam: float) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 3])
    rewards, values = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    found, wanted, at = gae(rewards, values, lengths, 0.9, lam), [], 0
    for n in lengths.tolist():
        v = [*values[at : at + n].tolist(), 0.0]
        d = [float(rewards[at + t]) + 0.9 * v[t + 1] - v[t] for t in range(n)]
        wanted += [sum((0.9 * lam) ** (k - t) * d[k] for k in range(t, n)) for t in range(n)]
        at += n
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_with_lambda_1_and_gamma_1_the_return_is_what_is_still_to_come() -> None:
    given = answers([1.0, 2.0, 3.0, 4.0], reference=torch.zeros(8))
    rewards = token_rewards(given, 0.1)
    judged = PPO(lam=1.0, gamma=1.0, whiten=False).judge(
        Answers(2, LENGTHS, given.rewards, given.old, given.reference, torch.randn(8)), 0.1, {}
    )
    togo = torch.cat([part.flip(0).cumsum(0).flip(0) for part in rewards.split(LENGTHS.tolist())])
    assert torch.allclose(judged.returns.double(), togo, atol=1e-6)


def test_token_rewards_by_hand() -> None:
    """- beta (old - reference) of each token, and the answer's reward at its last."""
    given = answers([1.0, 0.0, 2.0, -1.0], reference=torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]))
    found = token_rewards(given, 0.5)
    assert found.tolist() == [0.0, 0.5 + 1.0, -0.25 + 0.0, 0.0, 0.25, -0.375 + 2.0, 1.0, 0.0 - 1.0]


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert torch.allclose(whitened(x), (x - 3) / math.sqrt(14 / 3))
    assert torch.allclose(whitened(x, shift=False), (x - 3) / math.sqrt(14 / 3) + 3)
    assert whitened(torch.tensor([2.0])).tolist() == [0.0]


def test_best_of_takes_the_best_of_each_prompt_and_nothing_where_all_are_equal() -> None:
    rewards = torch.tensor([0.0, 2.0, 2.0, 1.0, 1.0, 1.0, 3.0, 2.0, 1.0])
    assert best_of(rewards, 3).tolist() == [False, True, False, False, False, False, True, False, False]
    assert best_of(rewards, 3, keep=2).tolist() == [False, True, True, False, False, False, True, True, False]
    judged = BestOf().judge(Answers(3, torch.ones(9, dtype=torch.long), rewards, torch.zeros(9)), 0.0, {})
    assert judged.used is not None and judged.used.tolist() == best_of(rewards, 3).tolist()
    assert judged.figures == {"kept": 2 / 9, "kept_reward": 2.5}


def test_a_running_baseline_remembers() -> None:
    memory: dict[str, float] = {}
    method = REINFORCE(decay=0.5, kl=KL(beta=0))
    first = method.judge(answers([1.0, 0.0, 2.0, 1.0]), 0.0, memory)
    assert first.advantages.tolist() == [0.0, 0.0, -1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    second = method.judge(answers([3.0, 3.0, 3.0, 3.0]), 0.0, memory)
    assert set(second.advantages.tolist()) == {2.0} and memory == {"baseline": 2.0}


def test_the_divergence_of_whole_answers_is_taken_off_their_rewards() -> None:
    given = answers([1.0, 0.0, 2.0, 1.0], reference=torch.full((8,), -1.0))
    assert given.divergence().tolist() == [-1.0, 0.5, 0.25, -2.0]
    judged = RLOO().judge(given, 2.0, {})
    assert judged.advantages.tolist() == [4.0, 4.0, -4.0, -3.5, -3.5, -3.5, 3.5, 3.5]


@pytest.mark.parametrize("method", [GRPO(), GRPO(scale="none"), RLOO(), BestOf(), BestOf(keep=3)], ids=lambda m: m.kind)
def test_too_few_answers_to_choose_among_are_a_lack(method: PolicyGradient) -> None:
    least = getattr(method, "keep", 1) + 1
    assert f"{least} or more" in (method.lack(least - 1) or "") and method.lack(least) is None


def test_one_answer_is_enough_for_methods_with_a_baseline_of_their_own() -> None:
    assert PPO().lack(1) is None and REINFORCE().lack(1) is None


def test_groups_that_are_all_equal_teach_nothing_unless_the_divergence_does() -> None:
    rewards = [1.0, 1.0, 0.0, 1.0]
    assert GRPO().judge(answers(rewards), 0.0, {}).used.tolist() == [False, False, True, True]  # type: ignore[union-attr]
    assert GRPO().judge(answers(rewards), 0.1, {}).used.tolist() == [True] * 4  # type: ignore[union-attr]


# Losses.


def test_the_surrogate_by_hand() -> None:
    """Ratios 2 and 1/2, advantages of both signs: clipped only where that takes gain away."""
    log_ratio, ones = torch.tensor([2.0, 0.5]).log(), torch.ones(2)
    loss, clipped = surrogate(log_ratio, ones, 0.2, 0.3)
    assert torch.allclose(loss, torch.tensor([-1.3, -0.5])) and clipped.tolist() == [True, False]
    loss, clipped = surrogate(log_ratio, -ones, 0.2, 0.3)
    assert torch.allclose(loss, torch.tensor([2.0, 0.8])) and clipped.tolist() == [False, True]


def test_grpo_by_hand() -> None:
    """Two answers of 2 and 1 tokens; nothing clips, no divergence: means of answers, of tokens, and over a constant."""
    logps, old = (
        torch.tensor([-1.0, -1.0, -2.0]),
        torch.tensor([-1.0, -1.0, -2.0]) - torch.tensor([1.1, 1.0, 0.9]).log(),
    )
    for per, wanted in (
        ("answer", -(1.05 * 1 + 0.9 * -2) / 2),
        ("token", -(2.1 - 1.8) / 3),
        ("constant", -(2.1 - 1.8) / 8),
    ):
        weights, counts = each_weight(torch.tensor([2, 1]), per, 4)  # type: ignore[arg-type]
        owner = torch.tensor([0, 0, 1])
        given = Tokens(weights[owner], counts.sum(), owner, torch.tensor([1.0, 1.0, -2.0]), old=old)
        loss = grpo_loss(logps, given)
        assert math.isclose(float(loss.sum / loss.count), wanted, rel_tol=1e-6), per


def test_the_divergence_in_the_loss_is_k3() -> None:
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    assert math.isclose(float(k3(torch.tensor([-1.0]), torch.tensor([-2.0]))), math.exp(-1) + 1 - 1, rel_tol=1e-6)
    logps, given = tokens(reference=-torch.rand(8, dtype=torch.float64))
    with_kl = Tokens(**{**vars(given), "beta": 0.3})
    assert torch.allclose(
        grpo_loss(logps, with_kl).sum - grpo_loss(logps, given).sum,
        0.3 * k3(logps, given.reference).sum(),  # type: ignore[arg-type]
    )


def test_k3_is_unbiased() -> None:
    """Its mean over a distribution is the exact divergence."""
    torch.manual_seed(0)
    policy, reference = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    assert torch.allclose((policy.exp() * k3(policy, reference)).sum(), exact)


def test_a_policy_that_has_not_moved_has_the_gradient_of_reinforce() -> None:
    """At ratio 1 the surrogate's gradient is that of - A log pi, for GRPO by tokens and for RLOO by answers."""
    logps, given = tokens("token")
    still = Tokens(**{**vars(given), "old": None})
    (found,) = torch.autograd.grad(grpo_loss(logps, still).sum, logps)
    assert torch.allclose(found, -given.advantages)
    logps, given = tokens("answer")
    still = Tokens(**{**vars(given), "old": None})
    (one,) = torch.autograd.grad(sequence_loss(logps, still, (0.2, 0.2)).sum, logps)
    (two,) = torch.autograd.grad(reinforce_loss(logps, still).sum, logps)
    assert torch.allclose(one, -given.advantages) and torch.allclose(two, -given.advantages)


def test_a_ratio_of_whole_answers_is_the_geometric_mean() -> None:
    logps, given = tokens("answer")
    loss, wanted = grpo_loss(logps, given, (0.2, 0.2), "answer"), 0.0
    for i in range(4):
        own = given.answer == i
        ratio = (logps[own] - given.old[own]).mean().exp()  # type: ignore[index]
        a = given.advantages[own][0]
        wanted -= torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).item()
    assert math.isclose(loss.sum.item(), wanted, rel_tol=1e-7)  # the weights are float32


def test_rloo_in_float64() -> None:
    logps, given = tokens("answer")
    loss, wanted = sequence_loss(logps, given, (0.2, 0.2)), 0.0
    for i in range(4):
        own = given.answer == i
        ratio = (logps[own] - given.old[own]).sum().exp()  # type: ignore[index]
        a = given.advantages[own][0]
        wanted -= torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).item()
    assert math.isclose(loss.sum.item(), wanted, rel_tol=1e-7) and float(loss.count) == 4


def test_the_value_loss_by_hand() -> None:
    """V 2, V_old 0, return 3, clip 1/2: the clipped value is 1/2 and further away, so it counts."""
    found, held = value_loss(torch.tensor([2.0, 0.2]), torch.zeros(2), torch.tensor([3.0, 1.0]), 0.5)
    assert torch.allclose(found, torch.tensor([0.5 * 2.5**2, 0.5 * 0.8**2])) and held.tolist() == [True, False]


def test_ppo_is_the_sum_of_its_parts() -> None:
    logps, given = tokens(values=torch.randn(8, dtype=torch.float64), returns=torch.randn(8, dtype=torch.float64))
    values = torch.randn(8, dtype=torch.float64, requires_grad=True)
    loss = ppo_loss(logps, values, given, (0.2, 0.2), 0.2, 0.7)
    policy, _ = surrogate(logps - given.old, given.advantages, 0.2, 0.2)  # type: ignore[operator]
    value, _ = value_loss(values, given.values, given.returns, 0.2)  # type: ignore[arg-type]
    assert torch.allclose(loss.sum, (policy + 0.7 * value).sum()) and float(loss.count) == 8
    loss.sum.backward()
    assert logps.grad is not None and values.grad is not None


def test_the_kept_answers_are_learned_by_cross_entropy() -> None:
    logps, given = tokens(advantages=torch.tensor([1.0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.float64))
    assert torch.allclose(kept_loss(logps, given).sum, -logps[[0, 1, 6, 7]].sum())


# Divergence and the comparison of sampler and trainer.


def test_an_adaptive_beta_follows_ziegler() -> None:
    kl = KL(beta=0.2, target=6.0)
    assert math.isclose(kl.adapted(0.2, 6.0), 0.2)
    assert math.isclose(kl.adapted(0.2, 6.6), 0.2 * 1.01)
    assert math.isclose(kl.adapted(0.2, 100.0), 0.2 * 1.02) and math.isclose(kl.adapted(0.2, 0.0), 0.2 * 0.98)
    assert KL(beta=0.2).adapted(0.2, 100.0) == 0.2
    with pytest.raises(ValueError, match="beta must begin above 0"):
        KL(beta=0, target=1.0)


def test_sampler_and_trainer_may_differ_by_rounding_and_no_more() -> None:
    one = torch.tensor([-1.0, -2.0])
    total, count = compare(one, one + torch.tensor([0.01, -0.03]), 0.05, ("a.jsonl:1", ""))
    assert math.isclose(float(total), 0.04, rel_tol=1e-5) and float(count) == 2
    with pytest.raises(FettleError, match=r"differ by 0\.2 nats a token .* more than 0\.05, on a\.jsonl:1; set"):
        compare(one, one + 0.2, 0.05, ("a.jsonl:1", ""))
    with pytest.raises(FettleError, match="differ by nan"):
        compare(one, one * math.nan, 0.05, ("a.jsonl:1",))
