"""How often the 95 % interval over patients covers the truth, for a simulated model with a known error rate.

    python benchmarks/interval_coverage.py

Patients have 1 to 20 questions, and a skill of their own: questions about one patient are not independent.
For comparison, the interval that resamples questions as if they were.
"""

from __future__ import annotations

import argparse

import numpy as np

from vilam3_jax.evals.statistics import cluster_interval

ACCURACY = 0.75
_SPREAD = 4.0  # concentration of the beta distribution of patients' skills; smaller spreads more
QUESTIONS = 20


def simulated(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each answer is right, float64 [n], and whose question it was, int [n]."""
    skill = rng.beta(_SPREAD * ACCURACY, _SPREAD * (1 - ACCURACY), patients)
    owner = np.repeat(np.arange(patients), rng.integers(1, QUESTIONS + 1, patients))
    return (rng.random(len(owner)) < skill[owner]).astype(np.float64), owner


def coverage(patients: int, *, repeats: int, by_patient: bool = True, seed: int = 0) -> float:
    """Share of simulated evaluations whose interval contains `ACCURACY`."""
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(repeats):
        right, owner = simulated(rng, patients)
        clusters = owner if by_patient else np.arange(len(owner))
        low, high = cluster_interval(right, clusters, repetitions=1000, seed=int(rng.integers(1 << 31)))
        covered += low <= ACCURACY <= high
    return covered / repeats


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="simulated evaluations per row")
    options = parser.parse_args()
    print("patients  by patient  by question")
    for patients in (10, 20, 50, 200):
        shares = [
            coverage(patients, repeats=options.repeats, by_patient=by_patient) for by_patient in (True, False)
        ]
        print(f"{patients:8}  {shares[0]:10.1%}  {shares[1]:11.1%}")


if __name__ == "__main__":
    main()
