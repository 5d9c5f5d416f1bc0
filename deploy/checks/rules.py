"""rules.py PROMTOOL RENDERED DIR: lints and tests the rules that a rendered manifest carries, and takes them out into DIR.

Every alert has a severity, a summary, a description and a section of the runbook; alerts_test.yaml fires each and shows
when it does not fire.
"""

import re
import subprocess
import sys
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
TESTS = DEPLOY / "components/monitoring/alerts_test.yaml"


def main(promtool, rendered, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    faults, alerts = [], []
    files = []
    for rules in yaml.safe_load_all(Path(rendered).read_text()):
        if rules["kind"] != "PrometheusRule":
            continue
        file = folder / f"{rules['metadata']['name'].removeprefix('crun-gateway-')}.rules.yaml"
        file.write_text(yaml.safe_dump(rules["spec"], sort_keys=False, allow_unicode=True))
        files.append(file)
        alerts += [rule for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    subprocess.run([promtool, "check", "rules", "--lint=all", "--lint-fatal", *files], check=True)

    # As headings become anchors: lower case, spaces to hyphens, most punctuation dropped.
    headings = re.findall(r"^#+ (.+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for alert in alerts:
        name, annotations = alert["alert"], alert["annotations"]
        if alert["labels"].keys() != {"severity"} or alert["labels"]["severity"] not in ("critical", "warning"):
            faults.append(f"{name}: its only label is a severity, critical or warning")
        if annotations.keys() != {"summary", "description", "runbook_url"}:
            faults.append(f"{name}: summary, description, runbook_url")
        page, _, anchor = annotations["runbook_url"].partition("#")
        if page != "deploy/RUNBOOK.md" or anchor != name.lower() or anchor not in anchors:
            faults.append(f"{name}: deploy/RUNBOOK.md has no section of that name")

    tests = yaml.safe_load(TESTS.read_text())
    cases = [case for test in tests["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        covered = {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires}
        for alert in alerts:
            if alert["alert"] not in covered:
                faults.append(f"{alert['alert']}: no test in which it {'fires' if fires else 'does not fire'}")
    if faults or not alerts:
        sys.exit("\n".join(faults))

    (folder / TESTS.name).write_text(TESTS.read_text())
    subprocess.run([promtool, "test", "rules", TESTS.name], cwd=folder, check=True)
    print(f"{len(alerts)} alerts, each linted, described, in the runbook, fired and not fired")


main(*sys.argv[1:])
