"""Writes down how a stage of run.sh went, and results.md and results.json from all that is known.

report.py add OUT NAME CODE SECONDS LIMIT LOG COMMAND...
report.py summary OUT
"""

import json
import sys
from pathlib import Path

TAIL_LINES = 30
# Left out, by a stage that says why.
LEFT_OUT = 77
TIMED_OUT = (124, 137)


def lines_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            # The last line of a stage that was stopped.
            continue
    return lines


def outcome(stage: dict) -> str:
    code = stage["code"]
    if code == 0:
        return "passed"
    if code == LEFT_OUT:
        return "left out"
    return f"stopped after {stage['limit_s']} s" if code in TIMED_OUT else f"failed ({code})"


def measures(out: Path) -> dict[str, dict[str, dict]]:
    kinds = ("in_process", "service", "transformers")
    return {kind: {line["name"]: line for line in lines_of(out / f"{kind}.measures.jsonl")} for kind in kinds}


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def beside(found: dict) -> list[str]:
    """Whole steps beside the peer's."""
    ours, theirs = found["in_process"], found["transformers"]
    rows = []
    for name, line in found["service"].items():
        # The server's picture is a file, which it decodes and resizes; the peer's is pixels that are there.
        peer = theirs.get(f"{name.removeprefix('service, ')}, to the first token", {}).get("ms")
        if peer is not None:
            mine = line["ttft_ms"]["median"]
            rows.append(f"| TTFT over gRPC, {name.removeprefix('service, ')} | {number(mine, 3)} | | | | {number(peer, 3)} | {number(peer / mine)} |")
    for name, line in ours.items():
        if "ms" not in line or not name.startswith(("decode step", "prompt of", "vision encoding")):
            continue
        peer = theirs.get(name, {}).get("ms")
        ratio = None if peer is None else peer / line["ms"]
        tokens_per_s = number(line["about"].get("tokens_per_s"), 1)
        cells = (number(line["ms"], 3), tokens_per_s, percent(line["of_read_bandwidth"]), percent(line["of_matrix_rate"]), number(peer, 3), number(ratio))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    head = "| | Lockstep, ms | tokens/s | of read bandwidth | of matrix rate | transformers, ms | transformers / Lockstep |\n|---|---|---|---|---|---|---|"
    return ["## Steps", "", head, *rows, ""]


def service(found: dict) -> list[str]:
    rows = []
    for name, line in found["service"].items():
        spread = lambda key, line=line: number((line.get(key) or {}).get("median"), 3)  # noqa: E731
        parts = line.get("server_ms") or {}
        server = ", ".join(f"{part} {number(times['median'])}" for part, times in parts.items() if times)
        rows.append(f"| {name} | {spread('ttft_ms')} | {spread('tpot_ms')} | {number(line.get('output_tokens_per_s'), 1)} | {server} |")
    if not rows:
        return []
    head = "| over gRPC | TTFT, ms | TPOT, ms | tokens/s | by the server's clock, ms |\n|---|---|---|---|---|"
    return ["## The service", "", head, *rows, ""]


def goals(found: dict) -> list[str]:
    """What was asked for, and what came of it, as far as both sides of it were measured."""
    ours, served = found["in_process"], found["service"]
    rows = []

    def goal(what: str, value: float | None, shown: str, is_met: bool) -> None:
        if value is not None:
            rows.append(f"| {what} | {shown} | {'yes' if is_met else 'no'} |")

    for name, line in ours.items():
        if name.startswith("decode step of 1 x") and "ms" in line:
            share = line["of_read_bandwidth"]
            goal(f"{name}: 85% of the read bandwidth", share, percent(share), (share or 0) >= 0.85)
        if name.startswith("prompt of") and "ms" in line:
            share = line["of_matrix_rate"]
            goal(f"{name}: 65% of the matrix rate", share, percent(share), (share or 0) >= 0.65)
    for name, line in served.items():
        tokens = name.removeprefix("service, text of ")
        if not tokens.isdigit():
            continue
        prompt, step = (ours.get(label, {}).get("ms") for label in (f"prompt of {tokens} tokens", f"decode step of 1 x {tokens} tokens"))
        if prompt is not None:
            added = line["ttft_ms"]["median"] - prompt
            goal(f"{name}: under 1 ms added to TTFT", added, f"{added:.3f} ms", added < 1)
        if step is not None and line.get("tpot_ms"):
            added = line["tpot_ms"]["median"] / step - 1
            goal(f"{name}: under 3% added to TPOT", added, percent(added), added < 0.03)
    if not rows:
        return []
    return ["## Goals", "", "| goal | measured | met |\n|---|---|---|", *rows, ""]


def write(out: Path) -> None:
    stages = lines_of(out / "stages.jsonl")
    versions = json.loads((out / "versions.json").read_text()) if (out / "versions.json").exists() else {}
    found = measures(out)
    (out / "results.json").write_text(json.dumps({"versions": versions, "stages": stages, "measures": found}, indent=1) + "\n")
    parts = ["# Results on a GPU", ""]
    if (out / "dry").exists():
        parts += ["**On stand-ins for CUDA's libraries, which run on the CPU: only whether stages pass means anything; no time does.**", ""]
    parts += [f"- {name}: {value}" for name, value in versions.items() if value]
    parts += ["", "| stage | outcome | s | command |", "|---|---|---|---|"]
    parts += [f"| {stage['name']} | {outcome(stage)} | {stage['seconds']} | `{stage['command']}` |" for stage in stages]
    parts += ["", *goals(found), *beside(found), *service(found)]
    ours = found["in_process"]
    if ours:
        parts += ["## Kernels", "", "| | ms | GB/s | TFLOP/s | of read bandwidth | of matrix rate |", "|---|---|---|---|---|---|"]
        for name, line in ours.items():
            if "left_out" in line:
                parts.append(f"| {name} | left out: {line['left_out']} | | | | |")
                continue
            rates = (line["bytes"] / line["ms"] * 1e-6, line["flops"] / line["ms"] * 1e-9)
            shown = " | ".join(number(rate, 1) if rate else "" for rate in rates)
            parts.append(f"| {name} | {number(line['ms'], 4)} | {shown} | {percent(line['of_read_bandwidth'])} | {percent(line['of_matrix_rate'])} |")
        parts.append("")
    for stage in stages:
        parts += [f"## {stage['name']}: {outcome(stage)}", "", "```", *stage["tail"], "```", ""]
    (out / "results.md").write_text("\n".join(parts))


def main() -> None:
    what, out = sys.argv[1], Path(sys.argv[2])
    if what == "add":
        name, code, seconds, limit, log, *command = sys.argv[3:]
        tail = Path(log).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        stage = {"name": name, "code": int(code), "seconds": int(seconds), "limit_s": int(limit), "command": " ".join(command), "tail": tail}
        with (out / "stages.jsonl").open("a") as stages:
            stages.write(json.dumps(stage) + "\n")
    write(out)


if __name__ == "__main__":
    main()
