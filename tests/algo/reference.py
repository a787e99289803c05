"""Slow references, one function per formula: rewards, advantages, the critic and the controllers.

Plain loops over groups, samples and tokens in float64, written from docs/MATH.md and from nothing else. A missing
reward is `valid == False`; its value is never read. The loss has its references in reference_loss.py.
"""

import itertools
import math

import numpy as np

EPS = 1e-4
WHITEN_EPS = 1e-8


def has_spread(values):
    """Whether a list of numbers holds two different ones."""
    return any(v != values[0] for v in values[1:])


def mean(values, counts=None):
    counts = [1.0] * len(values) if counts is None else counts
    total = math.fsum(counts)
    return math.fsum(c * v for c, v in zip(counts, values, strict=True)) / total if total else 0.0


def std(values, ddof, counts=None):
    """Root of the squared deviations over (count - ddof); 0 where that count is not positive."""
    counts = [1.0] * len(values) if counts is None else counts
    m, freedom = mean(values, counts), math.fsum(counts) - ddof
    if freedom <= 0:
        return 0.0
    return math.sqrt(math.fsum(c * (v - m) ** 2 for c, v in zip(counts, values, strict=True)) / freedom)


def whiten(values, ddof=1, counts=None, eps=WHITEN_EPS):
    """(x - mean) / (std + eps); zeros for fewer than two values or values that are all the same."""
    if len(values) < 2 or not has_spread(values):
        return [0.0] * len(values)
    m, s = mean(values, counts), std(values, ddof, counts)
    return [(v - m) / (s + eps) for v in values]


def scored(row, valid_row):
    """The indices of a group's samples that have a reward, and their rewards."""
    at = [g for g in range(len(row)) if valid_row[g]]
    return at, [float(row[g]) for g in at]


def by_group(rewards, valid, formula):
    """formula(q, indices, rewards) -> advantages of one group; 0 below two scored samples and without spread."""
    out = np.zeros(np.shape(rewards))
    for q in range(len(rewards)):
        at, r = scored(rewards[q], valid[q])
        if len(r) >= 2 and has_spread(r):
            for g, a in zip(at, formula(q, at, r), strict=True):
                out[q, g] = a
    return out


def over_batch(values, valid, formula):
    """formula(list of the batch's scored values, their [q, g]) -> new values at the same places."""
    at = [(q, g) for q in range(len(values)) for g in range(len(values[q])) if valid[q][g]]
    out = np.zeros(np.shape(values))
    for place, a in zip(at, formula([float(values[q][g]) for q, g in at], at), strict=True):
        out[place] = a
    return out


def raw(rewards, valid):
    return over_batch(rewards, valid, lambda r, at: r)


def batch_mean(rewards, valid):
    return over_batch(rewards, valid, lambda r, at: [x - mean(r) for x in r])


def grpo(rewards, valid, ddof=1, eps=EPS):
    return by_group(rewards, valid, lambda q, at, r: [(x - mean(r)) / (std(r, ddof) + eps) for x in r])


def dr_grpo(rewards, valid):
    return by_group(rewards, valid, lambda q, at, r: [x - mean(r) for x in r])


def rloo(rewards, valid):
    """Each reward minus the mean of the other scored ones of its group."""
    return by_group(rewards, valid, lambda q, at, r: [r[i] - mean(r[:i] + r[i + 1 :]) for i in range(len(r))])


def lite_ppo(rewards, valid, ddof=1, eps=EPS):
    everything = [x for row, v in zip(rewards, valid, strict=True) for x in scored(row, v)[1]]
    scale = std(everything, ddof) + eps
    return by_group(rewards, valid, lambda q, at, r: [(x - mean(r)) / scale for x in r])


def reinforce_pp(rewards, valid, lengths=None, ddof=1):
    """Whitened over the batch; with lengths a sample weighs as many as it has tokens."""
    return over_batch(rewards, valid, lambda r, at: whiten(r, ddof, _counts(lengths, at)))


def reinforce_pp_baseline(rewards, valid, lengths=None, ddof=1):
    white = reinforce_pp(dr_grpo(rewards, valid), valid, lengths, ddof)
    return by_group(rewards, valid, lambda q, at, r: [white[q][g] for g in at])


def _counts(lengths, at):
    return None if lengths is None else [float(lengths[q][g]) for q, g in at]


def remax(rewards, valid, greedy):
    """Reward minus that of the group's greedy completion; 0 for a group whose greedy completion has none (NaN)."""
    out = np.zeros(np.shape(rewards))
    for q in range(len(rewards)):
        for g, r in zip(*scored(rewards[q], valid[q]), strict=True):
            out[q, g] = 0.0 if math.isnan(greedy[q]) else r - float(greedy[q])
    return out


def opo(rewards, valid, lengths):
    def formula(q, at, r):
        tokens = [float(lengths[q][g]) for g in at]
        baseline = mean(r, tokens) if sum(tokens) > 0 else mean(r)
        return [x - baseline for x in r]

    return by_group(rewards, valid, formula)


def gpg(rewards, valid):
    groups = [scored(row, v)[1] for row, v in zip(rewards, valid, strict=True)]
    batch = sum(len(r) for r in groups)
    useful = sum(len(r) for r in groups if len(r) >= 2 and has_spread(r))
    return by_group(rewards, valid, lambda q, at, r: [(x - mean(r)) * batch / max(1, useful) for x in r])


def maxrl(rewards, valid, eps=EPS):
    return by_group(rewards, valid, lambda q, at, r: [(x - mean(r)) / mean(r) if mean(r) > eps else 0.0 for x in r])


def pass_at_k(rewards, valid, k, eps=EPS):
    """By listing every subset of k samples: mean best-of-k over those that hold i, minus the mean over all."""

    def formula(q, at, r):
        subsets = list(itertools.combinations(range(len(r)), k))
        best = [max(r[j] for j in subset) for subset in subsets]
        if not subsets or not has_spread(best):
            return [0.0] * len(r)
        mu, sigma = mean(best), std(best, 0)
        holding = [mean([b for b, s in zip(best, subsets, strict=True) if i in s]) for i in range(len(r))]
        return [(h - mu) / (sigma + eps) for h in holding]

    return by_group(rewards, valid, formula)


def pass_at_k_binary(rewards, valid, k, eps=EPS):
    """The paper's formula for rewards of 0 and 1, by factorials."""

    def formula(q, at, r):
        count = len(r)
        wrong = sum(1 for x in r if x == 0)
        if count < k:
            return [0.0] * count
        fail = math.comb(wrong, k) / math.comb(count, k)
        if fail in (0.0, 1.0):
            return [0.0] * count
        fail_if_wrong = math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1)
        sigma = math.sqrt(fail * (1 - fail))
        return [(fail if x == 1 else fail - fail_if_wrong) / (sigma + eps) for x in r]

    return by_group(rewards, valid, formula)


def gdpo(rewards, valid, weights, ddof=1, eps=EPS):
    """rewards, valid [F, Q, G]: each function's grpo, weighted, then divided by the spread over the batch.

    A sample is of the batch when any function scored it.
    """
    parts = [grpo(r, v, ddof, eps) for r, v in zip(rewards, valid, strict=True)]
    total = sum(w * z for w, z in zip(weights, parts, strict=True))
    answered = np.any(valid, axis=0)
    white = over_batch(total, answered, lambda s, at: whiten(s, ddof, eps=eps))
    for q in range(white.shape[0]):
        groups = [scored(rewards[f][q], valid[f][q])[1] for f in range(len(rewards))]
        if not any(len(r) >= 2 and has_spread(r) for r in groups):
            white[q] = 0.0
    return white


def combine_rewards(rewards, weights, valid):
    """[F, Q, G] -> (weighted sum over the functions that answered, whether any did)."""
    functions, prompts, samples = np.shape(rewards)
    reward, answered = np.zeros((prompts, samples)), np.zeros((prompts, samples), bool)
    for f, q, g in itertools.product(range(functions), range(prompts), range(samples)):
        if valid[f][q][g]:
            reward[q, g] += weights[f] * float(rewards[f][q][g])
            answered[q, g] = True
    return reward, answered


def soft_overlong(length, longest, buffer, factor=1.0):
    """The penalty of one completion of `length` tokens, its stop token counted."""
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return factor * ((longest - buffer) - length) / buffer
    return -factor


def kl_in_reward(reward, beta, logp, ref_logp, mask):
    """One sequence: r - beta * sum of k1 over its trained tokens, k1 = logp - ref_logp."""
    return reward - beta * math.fsum(float(p) - float(f) for p, f, m in zip(logp, ref_logp, mask, strict=True) if m)


def gae(reward, values, completion, gamma, lam, penalty=None):
    """One row: (advantages, returns) at the completion tokens, 0 elsewhere; penalty is beta_r * k1 per token."""
    at = [t for t in range(len(values)) if completion[t]]
    adv, ret = np.zeros(len(values)), np.zeros(len(values))
    next_adv = next_value = 0.0
    for t in reversed(at):
        u = (reward if t == at[-1] else 0.0) - (0.0 if penalty is None else float(penalty[t]))
        delta = u + gamma * next_value - float(values[t])
        adv[t] = delta + gamma * lam * next_adv
        ret[t] = adv[t] + float(values[t])
        next_adv, next_value = adv[t], float(values[t])
    return adv, ret


def value_loss(values, old_values, returns, mask, clip, tokens=None):
    """(loss, its gradient in values [N, T]): half the larger of the two squares, mean over the trained tokens."""
    count = max(int(np.sum(mask)) if tokens is None else tokens, 1)
    total, grad = 0.0, np.zeros(np.shape(values))
    for n, t in zip(*np.nonzero(mask), strict=True):
        v, ret = float(values[n][t]), float(returns[n][t])
        plain, slope = (v - ret) ** 2, v - ret
        if clip is not None:
            old = float(old_values[n][t])
            held = min(max(v, old - clip), old + clip)
            if (held - ret) ** 2 > plain:
                plain, slope = (held - ret) ** 2, (held - ret if held == v else 0.0)
        total += 0.5 * plain / count
        grad[n, t] = slope / count
    return total, grad


def adaptive_kl(beta, observed, target, horizon, completions):
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * completions / horizon)


def adaptive_entropy(alpha, entropy, target=0.2, step=0.005, low=0.0, high=1.0):
    """The next step's (coefficient, whether the next step uses it)."""
    below = entropy <= target
    return min(max(alpha + (step if below else -step), low), high), below
