"""Says where the shards' time goes: the functions of one shard, by their share of its processor time, for each measure of `compare.py`.

profile_shards.py --checkpoint DIR [--lockstep target/release/lockstep] [--world-size 1] [--top 8]

Needs Linux perf and leave to use it on one's own processes (kernel.perf_event_paranoid at most 2).
"""

import re
import subprocess
import tempfile
from pathlib import Path

from compare import MEASURES, bench, draw, lockstep_arguments, serve


def first_shard(server: int) -> str:
    """Process id of a shard of a server."""
    found = subprocess.run(["pgrep", "--parent", str(server)], capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit("the server has no shard")
    return found.stdout.split()[0]


def shares(record: Path, top: int) -> list[tuple[float, str]]:
    """Functions and their share of the samples in per cent, most first; threads that wait for work included."""
    command = ["perf", "report", "--stdio", "--no-children", "--percent-limit", "0.1", "--fields", "overhead,symbol", "-g", "none", "-i", record]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = re.findall(r"^\s+([\d.]+)%\s+\[.\]\s+(.+?)\s*$", report, re.MULTILINE)
    return [(float(share), name) for share, name in lines][:top]


def main() -> None:
    parser = lockstep_arguments(__doc__)
    parser.add_argument("--top", type=int, default=8, help="functions to name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(arguments) as (server, address):
        picture, record = Path(folder) / "picture.png", Path(folder) / "perf.data"
        draw(picture)
        for name in MEASURES:
            command = ["perf", "record", "--quiet", "-F", "199", "-o", record, "-p", first_shard(server.pid)]
            perf = subprocess.Popen(command)
            figure = bench(arguments, address, name, picture)
            perf.terminate()
            perf.wait()
            print(f"{name}: {figure:.1f}")
            for share, symbol in shares(record, arguments.top):
                print(f"  {share:5.1f}%  {symbol}")


if __name__ == "__main__":
    main()
