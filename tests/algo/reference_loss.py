"""Slow references of the loss: one function per formula, token by token, with exact derivatives.

Numbers are `Dual`: a value and its gradient in every input of the call, carried by the chain rule through the loops,
so that a gradient is as exact as its value and stop_gradient is what the formulas say. Written from docs/MATH.md.
"""

import math

import numpy as np


class Dual:
    """A float64 and its gradient, a vector (or 0.0, for a constant)."""

    __slots__ = ("g", "v")

    def __init__(self, v, g=0.0):
        self.v, self.g = float(v), g

    def __add__(self, other):
        o = lift(other)
        return Dual(self.v + o.v, self.g + o.g)

    def __mul__(self, other):
        o = lift(other)
        return Dual(self.v * o.v, self.g * o.v + self.v * o.g)

    def __truediv__(self, other):
        o = lift(other)
        return Dual(self.v / o.v, (self.g - o.g * (self.v / o.v)) / o.v)

    def __neg__(self):
        return Dual(-self.v, -self.g)

    def __sub__(self, other):
        return self + (-lift(other))

    def __rsub__(self, other):
        return lift(other) - self

    __radd__, __rmul__ = __add__, __mul__


def lift(x):
    return x if isinstance(x, Dual) else Dual(x)


def sg(x):
    """Stop-gradient."""
    return Dual(x.v)


def exp(x):
    return Dual(math.exp(x.v), math.exp(x.v) * x.g)


def expm1(x):
    return Dual(math.expm1(x.v), math.exp(x.v) * x.g)


def log(x):
    return Dual(math.log(x.v), x.g / x.v)


def tanh(x):
    return Dual(math.tanh(x.v), (1.0 - math.tanh(x.v) ** 2) * x.g)


def sigmoid(x):
    s = 1.0 / (1.0 + math.exp(-x.v)) if x.v >= 0 else math.exp(x.v) / (1.0 + math.exp(x.v))
    return Dual(s, s * (1.0 - s) * x.g)


def at_most(x, bound):
    """min(x, bound), x itself up to slack beyond it; None is no bound."""
    return x if bound is None or x.v <= bound + slack(bound) else Dual(bound)


def at_least(x, bound):
    return x if bound is None or x.v >= bound - slack(bound) else Dual(bound)


def slack(bound):
    """How far beyond a bound it acts."""
    return 1e-5 * max(1.0, abs(bound))


def clamp(x, low, high):
    return at_most(at_least(x, low), high)


def absolute(x):
    """|x|, with a slope that rises from 0 at 1e-4 to sign(x) at 1e-3."""
    slope = math.copysign(min(max((abs(x.v) - 1e-4) / 9e-4, 0.0), 1.0), x.v)
    return Dual(abs(x.v), slope * x.g)


def plus(low, one=1.0):
    return None if low is None else one + low


def total(xs):
    out = Dual(0.0)
    for x in xs:
        out = out + x
    return out


# Estimators of the KL divergence, x = ref_logp - logp, ratio the clamped token ratio.


def k1(x, ratio):
    return -x


def k2(x, ratio):
    return x * x * 0.5


def k3(x, ratio):
    y = at_most(x, 20.0)
    return expm1(y) - y


def kl_abs(x, ratio):
    return absolute(x)


def _plus(estimator):
    return lambda x, ratio: sg(estimator(x, ratio)) + k2(x, ratio) - sg(k2(x, ratio))


def _unbiased(estimator):
    return lambda x, ratio: estimator(x, ratio) * ratio


KL = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": kl_abs,
    "k1_plus": _plus(k1),
    "k3_plus": _plus(k3),
    "k1_unbiased": _unbiased(k1),
    "k3_unbiased": _unbiased(k3),
}


class Token:
    """One trained token: its inputs, its clamped log-ratio and, set later, its sequence and its ratio."""

    def __init__(self, place, logp, old, adv, ref, sampler, entropy):
        self.place, self.logp, self.old, self.adv = place, logp, old, adv
        self.ref, self.sampler, self.entropy = ref, sampler, entropy
        self.d = clamp(logp - old, -20.0, 20.0)
        self.log_w = 0.0 if sampler is None else min(max(old.v - sampler, -20.0), 20.0)
        self.sequence = self.ratio = None


def sequences(mask, segments):
    """The places of each sequence's trained tokens, in order; an id of 0 is padding, ids are of their row."""
    out = []
    for n in range(len(mask)):
        ids = [1] * len(mask[n]) if segments is None else list(segments[n])
        for wanted in sorted({int(i) for i in ids} - {0}):
            out.append([(n, t) for t in range(len(ids)) if ids[t] == wanted and mask[n][t]])
    return out


# Ratios and weights of one sequence (a list of tokens).


CORRECTION_BOUNDS = {
    "tis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "seq_tis": (None, 3.0),
    "seq_mask": (None, 3.0),
    "geo_gate": (0.999, 1.002),
}
"""The bounds (low, high) where none are given; the others must be given theirs."""


def mean_log_ratio(seq):
    return total(t.d for t in seq) / max(len(seq), 1)


def set_ratios(seq, level):
    s = exp(mean_log_ratio(seq))
    for t in seq:
        if level == "token":
            t.ratio = exp(t.d)
        elif level == "sequence":
            t.ratio = s
        else:
            t.ratio = sg(s) * exp(t.logp - sg(t.logp))


def weights(seq, name, low, high, veto):
    """The weight of each token under a sampler correction (1 with none), then the veto of the whole sequence."""
    default_low, default_high = CORRECTION_BOUNDS.get(name, (None, None))
    low, high = default_low if low is None else low, default_high if high is None else high
    w = [math.exp(t.log_w) for t in seq]
    whole = math.exp(min(max(math.fsum(t.log_w for t in seq), -20.0), 20.0))
    geometric = math.exp(math.fsum(t.log_w for t in seq) / max(len(seq), 1))

    def inside(x):
        return (low is None or x >= low - slack(low)) and (high is None or x <= high + slack(high))

    def cut(x):
        x = x if high is None else min(x, high)
        return x if low is None else max(x, low)

    out = {
        None: lambda: [1.0] * len(w),
        "tis": lambda: [cut(x) for x in w],
        "icepop": lambda: [x if inside(x) else 0.0 for x in w],
        "seq_tis": lambda: [cut(whole)] * len(w),
        "seq_mask": lambda: [whole if inside(whole) else 0.0] * len(w),
        "geo_tis": lambda: [cut(geometric)] * len(w),
        "geo_mask": lambda: [geometric if inside(geometric) else 0.0] * len(w),
        "geo_gate": lambda: [x if inside(geometric) else 0.0 for x in w],
    }[name]()
    if veto is not None and any(x < veto * (1 - 1e-5) for x in w):
        return [0.0] * len(w)
    return out


def off_policy(seq, threshold):
    """Whether each token's policy term is dropped: against its advantage and too far from what sampled it."""
    recorded = [t.old.v if t.sampler is None else t.sampler for t in seq]
    drift = math.fsum(q - t.logp.v for q, t in zip(recorded, seq, strict=True)) / max(len(seq), 1)
    return [t.adv < 0 and drift > threshold + slack(threshold) for t in seq]


# Surrogates: one token's term, to minimise.


def reinforce(t, cfg):
    return -t.adv * t.logp


def ppo_clip(t, cfg):
    if t.adv >= 0:
        return -t.adv * at_most(at_most(t.ratio, cfg.delta), plus(cfg.clip_high))
    term = -t.adv * at_least(at_most(t.ratio, cfg.delta), None if cfg.clip_low is None else 1.0 - cfg.clip_low)
    return term if cfg.dual_clip is None else at_most(term, -cfg.dual_clip * t.adv)


def is_clipped(t, cfg):
    """ppo_clip's clipped branch strictly larger than the plain one."""
    held = clamp(t.ratio, None if cfg.clip_low is None else 1.0 - cfg.clip_low, plus(cfg.clip_high))
    return -t.adv * held.v > -t.adv * t.ratio.v


def cispo(t, cfg):
    held = clamp(t.ratio, None if cfg.clip_low is None else 1.0 - cfg.clip_low, plus(cfg.clip_high))
    return -sg(held) * t.adv * t.logp


def sapo(t, cfg):
    tau = cfg.sapo_tau_pos if t.adv > 0 else cfg.sapo_tau_neg
    return sigmoid((t.ratio - 1.0) * tau) * (-4.0 / tau * t.adv)


def gmpo(t, cfg):
    def held(u):
        if t.adv >= 0:
            return at_most(u.d, cfg.clip_high)
        return at_least(u.d, None if cfg.clip_low is None else -cfg.clip_low)

    return -t.adv * exp(total(held(u) for u in t.sequence) / len(t.sequence))


def vespo(t, cfg):
    floor = math.log(1e-8)
    log_ratio = math.fsum(u.d.v for u in t.sequence)
    if cfg.correction is not None:
        held = weights(t.sequence, cfg.correction, cfg.correction_low, cfg.correction_high, None)
        log_ratio += math.fsum(min(max(math.log(max(w, 1e-8)), floor), 20.0) for w in held)
    log_ratio = min(max(log_ratio, floor), 20.0)
    positive = t.adv >= 0
    k, lam = (cfg.vespo_k_pos, cfg.vespo_lambda_pos) if positive else (cfg.vespo_k_neg, cfg.vespo_lambda_neg)
    return -math.exp(lam + k * log_ratio - lam * math.exp(log_ratio)) * t.adv * t.logp


def probability(logp):
    return math.exp(logp) if logp < 700.0 else math.inf


def dppo(t, cfg):
    moved = probability(t.logp.v) - probability(t.old.v)
    too_far_up = t.adv > 0 and cfg.clip_high is not None and moved > cfg.clip_high + slack(cfg.clip_high)
    too_far_down = t.adv < 0 and cfg.clip_low is not None and moved < -cfg.clip_low - slack(cfg.clip_low)
    keep = 0.0 if too_far_up or too_far_down else 1.0
    return -keep * min(t.ratio.v, 20.0) * t.adv * t.logp


def plain_ratio(t, cfg):
    return -t.ratio * t.adv


def penalised_ratio(t, cfg):
    return -t.ratio * t.adv + absolute(t.d) * cfg.kl_cov_coef


SURROGATES = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo": dppo,
    "clip_cov": ppo_clip,
    "kl_cov": plain_ratio,
}
LEVELS = {"ppo_clip": ("token", "sequence", "sequence_token"), "cispo": ("token", "sequence")}


def covariances(tokens):
    adv = math.fsum(t.adv for t in tokens) / max(len(tokens), 1)
    logp = math.fsum(t.logp.v for t in tokens) / max(len(tokens), 1)
    return [eleven_bits((t.adv - adv) * (t.logp.v - logp)) for t in tokens]


def eleven_bits(x):
    """x rounded to eleven significant bits, half to even."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**11), exponent - 11)


def cov_count(share, tokens):
    return max(1, math.floor(share * len(tokens)))


def largest_cov(tokens, share):
    """The indices of the tokens of largest covariance; of equal ones the earlier row, then the earlier position."""
    cov = covariances(tokens)
    order = sorted(range(len(tokens)), key=lambda i: (-cov[i], tokens[i].place))
    return set(order[: cov_count(share, tokens)])


def drawn_cov(tokens, cfg, draws):
    """The indices clip_cov takes out: of the eligible those with the smallest draws, [N, T] uniforms."""
    cov = covariances(tokens)
    eligible = [
        i for i, t in enumerate(tokens) if cfg.clip_cov_low < cov[i] < cfg.clip_cov_high and not is_clipped(t, cfg)
    ]
    order = sorted(eligible, key=lambda i: draws[tokens[i].place])
    return set(order[: cov_count(cfg.clip_cov_share, tokens)])


def policy_terms(tokens, seqs, cfg, draws):
    """Each token's policy term with everything that multiplies or removes it."""
    terms = [SURROGATES[cfg.surrogate](t, cfg) for t in tokens]
    if cfg.surrogate == "kl_cov":
        for i in largest_cov(tokens, cfg.kl_cov_share):
            terms[i] = penalised_ratio(tokens[i], cfg)
    if cfg.surrogate == "clip_cov":
        for i in drawn_cov(tokens, cfg, draws):
            terms[i] = Dual(0.0)
    factor = [1.0] * len(tokens)
    index = {t.place: i for i, t in enumerate(tokens)}
    for seq in seqs:
        name = None if cfg.surrogate == "vespo" else cfg.correction
        w = weights(seq, name, cfg.correction_low, cfg.correction_high, cfg.veto)
        gone = [False] * len(seq) if cfg.off_policy_threshold is None else off_policy(seq, cfg.off_policy_threshold)
        for t, x, out in zip(seq, w, gone, strict=True):
            factor[index[t.place]] = 0.0 if out else x
    if cfg.entropy_top < 1.0 and tokens:
        entropy = [round(t.entropy.v * 4096) / 4096 for t in tokens]
        threshold = np.quantile(entropy, 1.0 - cfg.entropy_top)
        factor = [f if h >= threshold else 0.0 for f, h in zip(factor, entropy, strict=True)]
    return [term * f if f else Dual(0.0) for term, f in zip(terms, factor, strict=True)]


def aggregate(values, seqs, cfg, token_count, sequence_count):
    """values: {place: term}. The scalar of a whole optimizer step."""
    if cfg.aggregation == "token_mean":
        return total(values.values()) / max(token_count, 1)
    if cfg.aggregation == "seq_mean_token_mean":
        return total(total(values[p] for p in s) / max(len(s), 1) for s in seqs) / max(sequence_count, 1)
    per_sequence = total(total(values[p] for p in s) for s in seqs) / max(sequence_count, 1)
    return per_sequence if cfg.aggregation == "seq_mean_token_sum" else per_sequence / cfg.max_completion_len


def policy_loss(
    logp,
    old_logp,
    adv,
    mask,
    cfg,
    ref_logp=None,
    sampler_logp=None,
    entropy=None,
    segments=None,
    draws=None,
    count=None,
):
    """A whole step: (loss, its gradient in logp, its gradient in entropy); old_logp None is logp without gradient.

    `count` is the number of sequences sampled where it is not what the arguments show.
    """
    shape = np.shape(mask)
    size = int(np.prod(shape))
    basis = np.eye(2 * size)
    places = sequences(mask, segments)
    seqs = []
    for seq in places:
        made = []
        for p in seq:
            at = p[0] * shape[1] + p[1]
            x = Dual(logp[p], basis[at])
            made.append(
                Token(
                    p,
                    x,
                    sg(x) if old_logp is None else Dual(old_logp[p]),
                    float(adv[p] if np.ndim(adv) == 2 else adv[p[0]]),
                    None if ref_logp is None else float(ref_logp[p]),
                    None if sampler_logp is None else float(sampler_logp[p]),
                    None if entropy is None else Dual(entropy[p], basis[size + at]),
                )
            )
        set_ratios(made, cfg.ratio_level)
        for t in made:
            t.sequence = made
        seqs.append(made)
    tokens = sorted((t for s in seqs for t in s), key=lambda t: t.place)
    values = dict(zip((t.place for t in tokens), policy_terms(tokens, seqs, cfg, draws), strict=True))
    if cfg.kl_coef and not cfg.kl_in_reward:
        for t in tokens:
            values[t.place] += KL[cfg.kl_estimator](t.ref - t.logp, exp(t.d)) * cfg.kl_coef
    loss = aggregate(values, places, cfg, len(tokens), len(places) if count is None else count)
    if cfg.entropy_coef:
        loss = loss - total(t.entropy for t in tokens) * (cfg.entropy_coef / max(len(tokens), 1))
    grad = loss.g + np.zeros(2 * size)
    return loss.v, grad[:size].reshape(shape), grad[size:].reshape(shape)


def head(hidden, unembed, targets, temperature=1.0, softcap=None, logit_scale=1.0):
    """hidden [M, D], unembed [D, V], targets [M]: lists of Dual (logp, entropy), gradients in (hidden, unembed)."""
    rows, width = hidden.shape
    vocab = unembed.shape[1]
    basis = np.eye(rows * width + width * vocab)
    h = [[Dual(hidden[m, d], basis[m * width + d]) for d in range(width)] for m in range(rows)]
    u = [[Dual(unembed[d, v], basis[rows * width + d * vocab + v]) for v in range(vocab)] for d in range(width)]
    logps, entropies = [], []
    for m in range(rows):
        logits = [total(h[m][d] * u[d][v] for d in range(width)) * logit_scale for v in range(vocab)]
        if softcap is not None:
            logits = [tanh(z / softcap) * softcap for z in logits]
        logits = [z / temperature for z in logits]
        top = max(z.v for z in logits)
        norm = log(total(exp(z - top) for z in logits)) + top
        logp = [z - norm for z in logits]
        logps.append(logp[targets[m]])
        entropies.append(-total(exp(p) * p for p in logp))
    return logps, entropies
