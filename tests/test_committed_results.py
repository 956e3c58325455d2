"""Numbers in README, guides and findings are those of the committed results they name."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def text(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


def short(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def test_the_guide_has_the_measured_rates_of_streaming():
    rows = result("hub-stream")["rows"]
    for rate, said in ((60, "of a line of 60 MB/s"), (125, "of 125 MB/s"), (250, "of 250 MB/s")):
        share = rows[f"throughput at {rate} MB/s"]["share_of_rate"]
        assert f"{short(share)} {said}" in text("docs/guide/hub.md")
        assert f"{short(share, 2 if rate == 250 else 3)} at {rate} MB/s" in text("docs/status.md")
    lost = rows["resume"]["worst_lost"]
    assert f"at most {short(100 * lost, 1)} % of the bytes were sent twice" in text("docs/guide/hub.md")


def test_the_design_note_has_rays_measured_overhead():
    found = result("ray-overhead")
    assert found["bar"]["ray / threads"] == sorted(found["ratios"])[len(found["ratios"]) // 2]
    assert f"{found['bar']['ray / threads']} × the wall time" in text("docs/design/cluster.md")
    assert f"{found['cpu_ratio']} × the CPU time" in text("docs/design/cluster.md")


def test_the_readme_has_the_time_of_the_study_and_the_memory_of_the_plan():
    assert result("lab-study")["seconds"]["wall_s"] < 240
    assert "under four minutes on two cores" in text("README.md")
    peaks = [run["peak_rss_mb"] for run in result("plan-671b")["runs"]]
    assert "planned in 10 s and 160 MB" in text("README.md")
    assert all(abs(peak - 160) < 1 for peak in peaks)


def test_the_findings_have_the_recovered_shares_of_both_new_seeds():
    goals = result("masked-recovery")["goals"]
    shares = {(goal["run"], goal["seed"]): goal["share"] for goal in goals}
    findings = text("docs/findings.md")
    for run in ("sub", "random"):
        first, second = (short(shares[run, seed]) for seed in (3, 4))
        assert any(f"{first} (" in cell and f"/ {second} (" in cell for cell in findings.split("| "))
    assert not any(goal["reached"] for goal in goals if goal["run"] == "random")
    assert "random at most .5, *missed*" in findings
