"""Each alert fires at what it is for, and none of a system that is idle or does its work."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import BY_CODE, InvalidRequest, NotFound
from tests.policy.sources import ROOT

ALERTS = ROOT / "deploy" / "grafana" / "alerts.yml"
MINUTES = 30
"""How long each story goes on. A sample is taken every minute."""
ALWAYS = f"x{MINUTES}"

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, which evaluates alerts, is not installed"
)

IDLE = {
    'up{job="twinlens"}': f"1{ALWAYS}",
    'twinlens_controller_members{job="twinlens",role="gateway",state="ready"}': f"1{ALWAYS}",
    'twinlens_controller_members{job="twinlens",role="vision",state="ready"}': f"0{ALWAYS}",
    'twinlens_controller_lost_members_total{job="twinlens"}': f"0{ALWAYS}",
    'twinlens_member_hung{job="twinlens",role="vision"}': f"0{ALWAYS}",
    'twinlens_gateway_requests_waiting{job="twinlens"}': f"0{ALWAYS}",
    'twinlens_member_expected_delay_seconds{job="twinlens",role="vision"}': f"0{ALWAYS}",
    'twinlens_member_expected_delay_seconds{job="twinlens",role="preprocess"}': f"0{ALWAYS}",
    'twinlens_gateway_rejections_total{job="twinlens",reason="too_many_waiting"}': f"7{ALWAYS}",
    'twinlens_gateway_failovers_total{job="twinlens",stage="llm"}': f"0{ALWAYS}",
    'twinlens_gateway_requests_total{job="twinlens",outcome="stop"}': f"9{ALWAYS}",
    'twinlens_gateway_requests_total{job="twinlens",outcome="Internal"}': f"0{ALWAYS}",
    'twinlens_gateway_requests_total{job="twinlens",outcome="UnreadableImage"}': f"0{ALWAYS}",
    'twinlens_gateway_time_to_first_token_seconds_bucket{job="twinlens",le="10"}': f"9{ALWAYS}",
    'twinlens_gateway_time_to_first_token_seconds_bucket{job="twinlens",le="+Inf"}': f"9{ALWAYS}",
    'twinlens_llm_kv_cache_usage_ratio{job="twinlens"}': f"0{ALWAYS}",
    'twinlens_llm_requests_waiting{job="twinlens"}': f"0{ALWAYS}",
}
"""The series of a system that has no vision stage and nothing to do, in promtool's notation."""
BUSY = {
    'requests_total{job="twinlens",outcome="stop"}': f"0+600{ALWAYS}",
    # One mistake of a client in ten requests, and one crowd that was sent away.
    'requests_total{job="twinlens",outcome="UnreadableImage"}': f"0+60{ALWAYS}",
    'rejections_total{job="twinlens",reason="too_many_waiting"}': "0x9 5x20",
    'requests_waiting{job="twinlens"}': f"6{ALWAYS}",
    'time_to_first_token_seconds_bucket{job="twinlens",le="10"}': f"0+600{ALWAYS}",
    'time_to_first_token_seconds_bucket{job="twinlens",le="+Inf"}': f"0+600{ALWAYS}",
}
STORIES: dict[str, dict[str, str]] = {
    "TwinlensNotServing": {'members{job="twinlens",role="gateway",state="ready"}': f"0{ALWAYS}"},
    "TwinlensStageLost": {'members{job="twinlens",role="vision",state="ready"}': "1x20 0x10"},
    "TwinlensMemberHung": {'member_hung{job="twinlens",role="vision"}': f"1{ALWAYS}"},
    "TwinlensMembersLost": {'lost_members_total{job="twinlens"}': "0x25 4x5"},
    "TwinlensUnreachable": {'up{job="twinlens"}': f"0{ALWAYS}"},
    "TwinlensQueueGrowing": {'requests_waiting{job="twinlens"}': "0x20 0+10x10"},
    "TwinlensVisionQueue": {
        'expected_delay_seconds{job="twinlens",role="preprocess"}': f"6{ALWAYS}"
    },
    "TwinlensRejecting": {
        'rejections_total{job="twinlens",reason="too_many_waiting"}': f"0+1{ALWAYS}"
    },
    "TwinlensFailovers": {'failovers_total{job="twinlens",stage="llm"}': "0x25 5x5"},
    "TwinlensErrors": {'requests_total{job="twinlens",outcome="Internal"}': f"0+1{ALWAYS}"},
    "TwinlensSlowFirstToken": {
        'time_to_first_token_seconds_bucket{job="twinlens",le="+Inf"}': f"9+1{ALWAYS}",
        'time_to_first_token_seconds_bucket{job="twinlens",le="25"}': f"9+1{ALWAYS}",
    },
    "TwinlensKvCacheFull": {
        'kv_cache_usage_ratio{job="twinlens"}': f"0.99{ALWAYS}",
        'llm_requests_waiting{job="twinlens"}': f"1{ALWAYS}",
    },
}
"""What fires each alert: series by the end of their names, in place of the idle ones."""


def series_of(story: dict[str, str]) -> dict[str, str]:
    """Return the idle series with those of a story in their place."""
    found = dict(IDLE)
    for end, values in story.items():
        names = [name for name in IDLE if name.endswith(end)]
        found |= dict.fromkeys(names, values)
        if not names:  # another bucket
            assert "le=" in end
            found[f"twinlens_gateway_{end}"] = values
    return found


def firing_test(alerts: set[str], series: dict[str, str]) -> dict[str, Any]:
    """Return promtool's test that these alerts fire at some time, and no others ever."""
    fires = []
    for name in STORIES:
        firing = f'count(ALERTS{{alertstate="firing",alertname="{name}"}}) or vector(0)'
        samples = [{"labels": "{}", "value": float(name in alerts)}]
        expr = f"max_over_time(({firing})[{MINUTES}m:1m])"
        fires.append({"expr": expr, "eval_time": f"{MINUTES}m", "exp_samples": samples})
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    return {"interval": "1m", "input_series": inputs, "promql_expr_test": fires}


def check(folder: Path, tests: list[dict[str, Any]]) -> None:
    file = folder / "tests.yml"
    content = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(content, width=10**6))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_story() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(STORIES)


def test_the_alert_of_errors_leaves_out_every_mistake_of_a_client() -> None:
    text = ALERTS.read_text()
    codes = [code for code, cls in BY_CODE.items() if issubclass(cls, InvalidRequest | NotFound)]
    assert f'outcome!~"{"|".join(codes)}"' in text


def test_each_alert_fires_in_its_story_only(tmp_path: Path) -> None:
    check(tmp_path, [firing_test({name}, series_of(story)) for name, story in STORIES.items()])


def test_no_alert_fires_of_an_idle_or_a_busy_system(tmp_path: Path) -> None:
    check(tmp_path, [firing_test(set(), series_of(story)) for story in ({}, BUSY)])
