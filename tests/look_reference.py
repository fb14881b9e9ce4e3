"""The figures of `stats` and `compare`, computed anew: position by position, in plain float64, from decoded rows."""

from __future__ import annotations

import math

import numpy as np

LEAST_TAIL = 2.0**-24


def positions_of(sequence):
    """(position, ids, logprobs float64, tail logprob) of each position with a distribution."""
    for t, (start, end) in enumerate(zip(sequence.offsets[:-1].tolist(), sequence.offsets[1:].tolist(), strict=True)):
        if end > start:
            yield (
                t,
                sequence.ids[start:end].tolist(),
                sequence.logprobs[start:end].astype(np.float64),
                float(sequence.tail[t]),
            )


def entropy_of(logprobs, tail):
    """Of candidates and the tail as one class, made to sum to one."""
    p = np.append(np.exp(logprobs), np.exp(tail))
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def stats_of(dataset):
    """Lists of what each position says; entropy as stored where it is."""
    found = {
        name: []
        for name in ("entropy", "coverage", "tail", "count", "rank", "outside", "surprise", "floor", "mean_entropy")
    }
    for sequence in dataset:
        own = []
        for t, ids, logprobs, tail in positions_of(sequence):
            stored = None if sequence.entropy is None else float(sequence.entropy[t])
            own.append(entropy_of(logprobs, tail) if stored is None or math.isnan(stored) else stored)
            found["coverage"].append(math.fsum(np.exp(logprobs)))
            found["tail"].append(math.exp(tail))
            found["count"].append(len(ids))
            if t + 1 == len(sequence.tokens):
                continue
            following = int(sequence.tokens[t + 1])
            at = ids.index(following) if following in ids else None
            rank = 0 if sequence.target_rank is None else int(sequence.target_rank[t])
            found["rank"].append(rank or (0 if at is None else at + 1))
            found["outside"].append(at is None)
            known = math.nan if sequence.target_logprob is None else float(sequence.target_logprob[t])
            if math.isnan(known) and at is not None:
                known = float(logprobs[at])
            if math.isnan(known):
                bound = float(logprobs[-1])
                found["floor"].append(-min(bound, tail) if math.isfinite(tail) else -bound)
            else:
                found["surprise"].append(-known)
                found["floor"].append(-known)
        found["entropy"] += own
        found["mean_entropy"].append(math.fsum(own) / len(own) if own else None)
    return found


def divergences(p, q):
    """(KL(p ‖ q), KL(q ‖ p), JSD, JSD at most, entropies) of {id: probability} with the tail under -1: rests are one class."""
    p = {token: value / math.fsum(p.values()) for token, value in p.items()}
    q = {token: value / math.fsum(q.values()) for token, value in q.items()}
    shared = [token for token in p if token in q and token >= 0]
    a = np.array([p[token] for token in shared] + [math.fsum(v for t, v in p.items() if t not in shared)])
    b = np.array([q[token] for token in shared] + [math.fsum(v for t, v in q.items() if t not in shared)])
    m = (a + b) / 2
    jsd = [(a[i] * math.log(a[i] / m[i]) + b[i] * math.log(b[i] / m[i])) / 2 for i in range(len(a))]
    at_most = math.fsum(jsd[:-1]) + m[-1] * math.log(2)
    entropies = [-(x * np.log(x)).sum() for x in (a, b)]
    return (a * np.log(a / b)).sum(), (b * np.log(b / a)).sum(), math.fsum(jsd), at_most, *entropies


def compared(a, b):
    """One dictionary a position where both have a distribution; a and b are sequences of the same tokens."""
    others = {t: (ids, logprobs, tail) for t, ids, logprobs, tail in positions_of(b)}
    for t, ids, logprobs, tail in positions_of(a):
        if t not in others:
            continue
        ids_b, logprobs_b, tail_b = others[t]
        p = dict(zip(ids, np.exp(logprobs).tolist(), strict=True)) | {-1: max(math.exp(tail), LEAST_TAIL)}
        q = dict(zip(ids_b, np.exp(logprobs_b).tolist(), strict=True)) | {-1: max(math.exp(tail_b), LEAST_TAIL)}
        kl_ab, kl_ba, jsd, at_most, entropy_a, entropy_b = divergences(p, q)
        both = set(ids) & set(ids_b)
        log_a, log_b = (dict(zip(i, v.tolist(), strict=True)) for i, v in ((ids, logprobs), (ids_b, logprobs_b)))
        yield {
            "position": t,
            "kl_ab": kl_ab,
            "kl_ba": kl_ba,
            "jsd": jsd,
            "jsd_at_most": at_most,
            "agree": ids[0] == ids_b[0],
            "overlap": len(both) / min(len(ids), len(ids_b)),
            "shared_a": math.fsum(p[i] for i in both) / math.fsum(p.values()),
            "shared_b": math.fsum(q[i] for i in both) / math.fsum(q.values()),
            "identical": log_a == log_b,
            "moved": [abs(log_a[i] - log_b[i]) for i in both],
            "entropy_a": entropy_a,
            "entropy_b": entropy_b,
            "best_a": (ids[0], math.exp(logprobs[0])),
            "best_b": (ids_b[0], math.exp(logprobs_b[0])),
        }
