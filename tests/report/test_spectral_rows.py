"""Every cell of the spectral tables is the record's number, with the reference under it."""

from __future__ import annotations

import numpy as np

from sparsity_audit.report.spectral_rows import (
    OVERLAP_HEAD,
    SPECTRAL_HEAD,
    overlap_rows,
    refusal_lines,
    spectral_rows,
)
from sparsity_audit.stats.spectral import SpectralQuestion, spectral_record
from sparsity_audit.stats.spectral_records import MaskOverlap, SpectralMeasures, SpectralRecord
from sparsity_audit.types import DType, View


def _record() -> SpectralRecord:
    overlaps = tuple(
        MaskOverlap(
            target=target,
            alpha=alpha,
            entries=round(alpha * 200),
            ties_at_cut=1,
            share=share,
            chance=alpha,
            chance_sd=0.02,
            magnitude_share=share + 0.01,
            magnitude_sd=0.003,
        )
        for target, share in (("principal", 0.05), ("low-magnitude", 0.3))
        for alpha in (0.1, 0.25)
    )
    return SpectralRecord(
        name="w",
        shape=(20, 10),
        view=View.NATIVE,
        criterion="value",
        entries=200,
        changed=50,
        full_rank=10,
        k=2,
        observed=SpectralMeasures(rank_float64=10.0, stable_rank=4.25, nss=1.5e-3, left_max_angle_deg=2.0),
        num_draws=3,
        reference_mean=SpectralMeasures(rank_float64=9.5, stable_rank=6.125),
        reference_sd=SpectralMeasures(rank_float64=0.5, stable_rank=0.25),
        overlaps=overlaps,
    )


def test_an_update_stands_above_its_reference_with_a_dash_where_nothing_is_defined() -> None:
    update, reference = spectral_rows([_record()])
    cells = dict(zip(SPECTRAL_HEAD, update, strict=True))
    assert cells["matrix"] == "w (20×10)"
    assert (cells["rank (float64)"], cells["stable rank"], cells["NSS"]) == ("10", "4.25", "0.0015")
    assert (cells["left angle °"], cells["right angle °"], cells["effective rank"]) == ("2", "–", "–")
    cells = dict(zip(SPECTRAL_HEAD, reference, strict=True))
    assert cells["stable rank"] == "6.125 ± 0.2"
    assert cells["NSS"] == "–"


def test_overlaps_stand_above_chance_and_what_magnitudes_give() -> None:
    update, chance, magnitudes = overlap_rows([_record()])
    assert update == ["w", "update", "25.0 %", "5.0 %", "30.0 %", "5.0 %", "30.0 %"]
    assert chance[3:] == ["10.0 ± 2", "10.0 ± 2", "25.0 ± 2", "25.0 ± 2"]
    assert magnitudes[3:] == ["6.0 ± 0.3", "31.0 ± 0.3", "6.0 ± 0.3", "31.0 ± 0.3"]
    assert len(OVERLAP_HEAD) == len(update)


def test_an_estimate_says_so_and_a_refusal_gives_its_reason() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((30, 20))
    question = SpectralQuestion(
        name="big",
        view=View.NATIVE,
        dtype=DType.F64,
        criterion="value",
        max_dim=8,
        num_draws=1,
        seed=0,
    )
    estimate = spectral_record(base, base + 1, np.ones(base.shape, dtype=bool), question)
    rows = spectral_rows([estimate])
    assert rows[0][0] == "big (30×20, estimate)"
    assert rows[0][2] == "–"
    refused = SpectralRecord(
        name="n", shape=(3,), view=View.NATIVE, criterion="value", refused="shape [3] is no matrix"
    )
    assert spectral_rows([refused]) == overlap_rows([refused]) == []
    assert refusal_lines([estimate, refused]) == ["n: shape [3] is no matrix"]
