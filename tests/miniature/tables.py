"""Writes the tables of the studies into the README.md beside it, from results.jsonl: mean and standard error over the seeds.

    python tests/miniature/tables.py             # writes them; with --check only says whether they are up to date

In the README a table stands between <!-- study: NAME --> and <!-- end -->; that of the costs between <!-- costs --> and
<!-- end -->.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run import ROOT, RUNS, STUDIES, read_results  # noqa: E402

README = Path(__file__).with_name("README.md")


def cell(column: str, values: list[float]) -> str:
    """Mean ± standard error of the mean (with n - 1), in percent; of what a comparison costs, the mean."""
    if not values:
        return "-"
    if column.endswith("a comparison"):
        return f"{statistics.mean(values):.3g}"
    error = (
        f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    )
    return f"{100 * statistics.mean(values):.1f}{error}"


def table(name: str, results: dict) -> str:
    """A study as Markdown: rows down, what was measured across, then the paper's figures."""
    study = STUDIES[name]
    runs = {row.run for row in study.rows}
    of = {
        run: [line["measured"] for (each, _), line in results.items() if each == run]
        for run in runs
    }
    seeds = sorted({len(found) for found in of.values()})
    seeds = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    lines = [
        [f"percent, {seeds}", *study.columns, *([f"paper: {study.paper}"] if study.paper else [])]
    ]
    for label, run, part, paper in study.rows:
        cells = [
            cell(column, [found[part + column] for found in of[run]]) for column in study.columns
        ]
        lines.append([label, *cells, *([paper] if study.paper else [])])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_needed(runs: set[str]) -> set[str]:
    """These runs and those whose artifacts they use."""
    more = {needed for run in runs for needed in RUNS[run].needs} - runs
    return with_needed(runs | more) if more else runs


def costs(results: dict) -> str:
    """What each study takes by itself, with all that it needs, two runs at a time; and all of them together, which
    share runs."""
    studies = {
        name: with_needed({row.run for row in study.rows}) for name, study in STUDIES.items()
    }
    lines = [["study", "runs", "minutes on two cores"]]
    for name, runs in (studies | {"all": set(RUNS)}).items():
        seconds = [line["seconds"] for (run, _), line in results.items() if run in runs]
        lines.append([name, str(len(seconds)), f"{sum(seconds) / 2 / 60:.0f}"])
    return markdown(lines)


def filled_in(readme: str) -> str:
    """The README with every study's table, and that of the costs, as results.jsonl has it."""
    results = read_results()
    fill = lambda found: f"{found[1]}\n{table(found[2], results)}\n<!-- end -->"
    readme = re.sub(r"(<!-- study: (\w+) -->)\n.*?<!-- end -->", fill, readme, flags=re.DOTALL)
    return re.sub(
        r"(<!-- costs -->)\n.*?<!-- end -->",
        rf"\1\n{costs(results)}\n<!-- end -->",
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    readme = README.read_text()
    if filled_in(readme) != readme:
        if "--check" in sys.argv:
            sys.exit(
                "the README's tables are not those of results.jsonl; run python tests/miniature/tables.py"
            )
        README.write_text(filled_in(readme))
